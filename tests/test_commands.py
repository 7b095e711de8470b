"""The paper's seven commands as their scripts hold them, and the launchers of one node (several: test_clusters.py)."""

import argparse
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from runs import ROOT, TINY, Run, environment, expect, run_main, tiny_tree

import oversmoothing
from optim import LRPlan
from options import check_args, get_args_parser
from oversmoothing.weights import read_checkpoint
from reporting import EpochLog

NAMES = ("attnscale_small_12", "attnscale_small_24", "featscale_small_12", "featscale_small_24")
NAMES += ("attnscale_cait_s24_224", "featscale_cait_s24_224", "eval_attnscale_small_12")
SCRIPTS = [ROOT / "scripts" / "reproduce" / f"{name}.sh" for name in NAMES]
SWIN = ("attnscale_swin_small", "featscale_swin_small")
SWIN_SCRIPTS = [ROOT / "scripts" / "reproduce" / f"{name}.sh" for name in SWIN]
PAPER = ROOT.parent / "shared" / "paper-commands.md"
SHORT = ("--epochs", "1", "--batch-size", "4", "--num_workers", "0")
NARROW = ("--model-kwargs", "embed_dim=96", "num_heads=3")  # what a command does depends on its flags, not on the width
CLASSES, TRAIN, VAL = 3, 8, 7  # one step of four images in each process


# ---- the text of the commands ----------------------------------------------------------------------------------------
def printed_command(script: Path) -> str:
    """The command of a script as the paper prints it, with its places to fill in."""
    text = script.read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("python "))
    checkpoint = "</ckpt_dir>/attnscale_small_12.pth" if "--eval" in line else "</ckpt_path>"
    for ours, papers in {
        '"${NUM_GPUS:-2}"': "2",
        '"$DATA_PATH"': "</data_path>",
        '"$CHECKPOINT"': checkpoint,
        '"$@"': "",
    }.items():
        line = line.replace(ours, papers)
    return " ".join(line.split())


def test_the_scripts_hold_the_papers_seven_commands() -> None:
    if not PAPER.exists():
        pytest.skip(f"{PAPER} is not here")
    numbered = re.findall(r"^\d\. .*?`(python [^`]+)`", PAPER.read_text(), re.MULTILINE)
    assert len(numbered) == 6
    cait = next(line for line in numbered if "attnscale_cait_S24_224" in line)
    # The sixth is given by its differences from the fifth.
    numbered.append(cait.replace("29704", "29705").replace("attnscale_cait", "featscale_cait"))
    assert sorted(map(printed_command, SCRIPTS)) == sorted(numbered)


@pytest.mark.parametrize("script", SWIN_SCRIPTS, ids=lambda path: path.stem)
def test_the_swin_scripts_hold_its_recipe(script: Path) -> None:
    """1,024 images a step for 300 epochs: the rate rises from 1e-6 to 1e-3 in 20 of them and ends at 1e-5."""
    text = script.read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("torchrun "))
    words = line.partition("main.py ")[2].replace('"$DATA_PATH"', "data").replace(' "$@"', "").split()
    args = get_args_parser().parse_args(words)
    check_args(args)
    assert args.model == f"{script.stem}_patch4_window7_224" and args.output_dir == f"./logs/imnet1k_{script.stem}"
    plan = LRPlan(args, world_size=8, steps_per_epoch=1251)
    assert plan(0) == pytest.approx(1e-6) and plan(0, 2) > plan(0, 1) and plan(299, 1250) == pytest.approx(1e-5)
    assert max(plan(epoch) for epoch in range(300)) == plan(20) == pytest.approx(1e-3, rel=1e-3)
    assert (args.weight_decay, args.clip_grad, args.drop_path) == (0.05, 5.0, 0.3)
    assert (args.opt, args.model_ema, args.repeated_aug) == ("adamw", False, False)


@pytest.mark.parametrize("script", SCRIPTS + SWIN_SCRIPTS, ids=lambda path: path.stem)
def test_a_script_states_what_to_expect_and_asks_for_its_paths(script: Path, tmp_path: Path) -> None:
    text = script.read_text()
    assert re.search(r"Expected: 8\d\.\d% top-1, as reported by the paper \(arXiv 2203\.05962", text)
    assert "Never run here" in text

    bash = shutil.which("bash")
    done = subprocess.run([bash, script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "DATA_PATH: set it to" in done.stderr and done.stdout == ""
    if "$CHECKPOINT" in text:
        env = {"PATH": "/usr/bin:/bin", "DATA_PATH": str(tmp_path)}
        done = subprocess.run([bash, script], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode != 0 and "CHECKPOINT: set it to" in done.stderr


# ---- the commands, run -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("imagenet"), classes=CLASSES, train=TRAIN, val=VAL)


@pytest.fixture
def reproduce(tmp_path: Path, data: Path):
    """Runs a script from another folder, in a copy of the repository's layout, so that ./logs is not the user's.

    Gives the merged output and the run's output folder.
    """
    shutil.copytree(ROOT / "scripts" / "reproduce", tmp_path / "repository" / "scripts" / "reproduce")
    (tmp_path / "repository" / "main.py").symlink_to(ROOT / "main.py")
    (tmp_path / "data").symlink_to(data)
    python_first = f"{Path(sys.executable).parent}:{environment()['PATH']}"

    def run(name: str, *flags: str, checkpoint: str = "") -> tuple[str, Path]:
        script = tmp_path / "repository" / "scripts" / "reproduce" / f"{name}.sh"
        env = environment(PATH=python_first, DATA_PATH="data", CHECKPOINT=checkpoint, NUM_GPUS="2")
        with Run(["bash", str(script), *SHORT, *flags], env, cwd=tmp_path) as started:
            output = expect(started, timeout=400).stdout
        assert "2 process(es) on CPU" in output
        return output, tmp_path / "repository" / "logs" / f"imnet1k_{name}"

    return run


def write_public_cait(path: Path, classes: int) -> dict[str, torch.Tensor]:
    """A file as DeiT's authors publish CaiT: under ``model``, every name behind ``module.``."""
    torch.manual_seed(0)
    weights = timm.create_model("cait_s24_224", num_classes=classes).state_dict()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)
    return weights


def assert_trained(output: str, folder: Path, epochs: int = 1) -> None:
    """The epochs are in the log once each, the network was evaluated on every image, and its weights moved."""
    assert f"Accuracy of the network on the {VAL} test images" in output
    log = EpochLog.read(folder / "log.txt")
    assert [line["epoch"] for line in log] == list(range(epochs))
    checkpoint = read_checkpoint(folder / "checkpoint.pth")
    assert (checkpoint["epoch"], checkpoint["step"]) == (epochs - 1, 0)
    # AdamW moves a parameter with a gradient; the remedy's own have one from the first step on.
    lambdas = {n: t for n, t in checkpoint["model"].items() if oversmoothing.is_remedy_parameter(n)}
    assert lambdas and all(tensor.abs().max() > 0 for tensor in lambdas.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attnscale_small_24", "featscale_small_12", "featscale_small_24"])
def test_a_training_command_trains(name: str, reproduce) -> None:
    output, folder = reproduce(name, *(() if name == "attnscale_small_24" else NARROW))
    assert f"model: {name}, " in output
    assert f"holds {CLASSES} classes, IMNET 1000: a head for {CLASSES}" in output
    assert_trained(output, folder)
    if "--drop 0.2" in printed_command(ROOT / "scripts" / "reproduce" / f"{name}.sh"):
        assert '"drop": 0.2' in output


@pytest.mark.slow
@pytest.mark.parametrize("name", SWIN)
def test_a_swin_command_trains(name: str, reproduce) -> None:
    size = ("--model-kwargs", "embed_dim=12", "depths=(1,1,2,1)", "num_heads=(1,2,3,6)")
    output, folder = reproduce(name, *size, "--warmup-epochs", "0")
    assert f"model: {name}_patch4_window7_224, " in output and "LR at the first step of epoch: 0: " in output
    assert_trained(output, folder)


@pytest.mark.slow
def test_a_second_run_of_a_training_command_goes_on_where_the_first_ended(reproduce) -> None:
    output, folder = reproduce("attnscale_small_12", *NARROW)
    assert "auto-reload" not in output
    assert_trained(output, folder)
    before = (folder / "log.txt").read_text(), (folder / "checkpoint.pth").read_bytes()

    output, _ = reproduce("attnscale_small_12", *NARROW)
    assert "auto-reload: continuing from logs/imnet1k_attnscale_small_12/checkpoint.pth" in output
    assert "nothing left to train" in output
    assert before == ((folder / "log.txt").read_text(), (folder / "checkpoint.pth").read_bytes())


@pytest.mark.slow
def test_the_attnscale_fine_tuning_starts_from_a_public_cait_file_and_goes_on_when_run_again(
    reproduce, tmp_path: Path
) -> None:
    """The file has ImageNet's 1,000 classes, which the model keeps on a tree with only some of them."""
    write_public_cait(tmp_path / "S24_224.pth", classes=1000)
    output, folder = reproduce("attnscale_cait_s24_224", checkpoint="S24_224.pth")
    assert "model: attnscale_cait_S24_224, " in output and "1000 classes" in output
    assert "left at initial value: blocks.*.attn.lamb (24)" in output and "weights only" in output
    assert_trained(output, folder)

    output, _ = reproduce("attnscale_cait_s24_224", "--epochs", "2", checkpoint="S24_224.pth")
    assert "auto-reload: continuing from" in output and "S24_224.pth is ignored" in output
    assert "Epoch: [0]" not in output and "Epoch: [1]" in output
    assert_trained(output, folder, epochs=2)


@pytest.mark.slow
def test_the_featscale_fine_tuning_starts_from_a_cait_file_with_the_trees_own_classes(
    reproduce, tmp_path: Path
) -> None:
    published = write_public_cait(tmp_path / "S24_224.pth", classes=CLASSES)
    output, folder = reproduce("featscale_cait_s24_224", checkpoint="S24_224.pth")
    assert "left at initial value: blocks.*.lamb1 (24), blocks.*.lamb2 (24)" in output
    assert_trained(output, folder)
    # One epoch at the warm-up rate of 1e-6: still close to the published weights, so those were what it started from.
    trained = read_checkpoint(folder / "checkpoint.pth")["model"]
    assert all((trained[name] - tensor).abs().max() < 1e-4 for name, tensor in published.items())


@pytest.mark.slow
def test_the_evaluation_command_takes_a_published_file(reproduce, tmp_path: Path) -> None:
    """Of 1,000 classes, with DeiT's ``args`` (a Namespace) beside the weights."""
    torch.manual_seed(0)
    model = timm.create_model("attnscale_small_12")
    path = tmp_path / "attnscale_small_12.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=5e-4), "epoch": 299}, path)
    output, folder = reproduce("eval_attnscale_small_12", checkpoint=str(path))
    assert re.search(r"loaded (\d+) of \1 tensors from .*attnscale_small_12.pth$", output, re.MULTILINE), output
    assert f"Accuracy of the network on the {VAL} test images" in output
    assert "Epoch: [" not in output and not folder.exists()


# ---- launchers -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def evaluation(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """Flags of the cheapest evaluation there is, and the accuracy that it has to print, known from one process."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.manual_seed(1)
    model = timm.create_model(
        "attnscale_small_12", embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=32, num_classes=CLASSES
    )
    for parameter in model.parameters():  # as after some training: the answer depends on the image
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(model.state_dict(), path)
    flags = [*TINY, "--data-path", str(data), "--eval", "--resume", str(path)]
    return flags, accuracy(run_main(*flags).stdout, 1)


def accuracy(output: str, processes: int) -> str:
    """The one accuracy line of a run, after a check of its world size."""
    assert f"{processes} process(es) on CPU" in output, output
    lines = re.findall(r"^Accuracy of the network on the 7 test images: \d+\.\d+%$", output, re.MULTILINE)
    assert len(lines) == 1, output
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch", "launch_without_use_env", "torchrun"])
def test_launchers_on_one_node(launcher: str, evaluation: tuple[list[str], str]) -> None:
    flags, expected = evaluation
    assert accuracy(run_main(*flags, processes=2, launcher=launcher).stdout, 2) == expected


@pytest.mark.slow
def test_a_lonely_process_in_a_slurm_shell_is_no_group(evaluation: tuple[list[str], str]) -> None:
    """An interactive allocation sets the variables too, but starts one process."""
    flags, expected = evaluation
    env = environment(SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_JOB_NODELIST="node[03-07]", SLURM_JOB_ID="7")
    assert accuracy(run_main(*flags, env=env).stdout, 1) == expected


@pytest.mark.slow
def test_a_taken_port_is_named(evaluation: tuple[list[str], str]) -> None:
    """What two runs with the same --master_port on one machine give."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = environment(MASTER_PORT=str(taken.getsockname()[1]), **names)
        done = run_main(*evaluation[0], env=env, code=2)
    assert "the port is taken: give the launcher another --master_port" in done.stdout
    assert "Traceback" not in done.stdout
