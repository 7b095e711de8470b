"""scripts/push_to_hub.py: what is published, that timm reads it again, and that nothing private goes with it."""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import LocalHub, serving, use
from huggingface_hub import ModelCard
from PIL import Image
from runs import ROOT, environment, tiny_tree
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

import checkpoints
from options import get_args_parser
from oversmoothing.analysis.cost import count_macs
from oversmoothing.weights import load_weights, read_checkpoint
from scripts import model_card, push_to_hub
from scripts.comparison.study import NO_EFFECT

SIZE = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2)
FLAGS = (
    *("--model", "featscale_small_12", "--model-kwargs", *(f"{key}={value}" for key, value in SIZE.items())),
    *("--input-size", "32", "--data-path", "/secret/data", "--data-set", "CIFAR10", "--output_dir", "/secret/out"),
    *(
        "--resume",
        "/secret/start.pth",
        "--epochs",
        "3",
        "--lr",
        "1e-3",
        "--no-repeated-aug",
        "--opt-betas",
        "0.8",
        "0.9",
    ),
    *("--teacher-path", "/secret/teacher", "--dist_url", "tcp://secret:1", "--eval-crop-ratio", "1.0"),
)


def write_run(folder: Path, *, flags: tuple[str, ...] = FLAGS, ema: bool = True, **changes: Any) -> Path:
    """A run's folder after three epochs of which the second was the best; weights of each epoch differ."""
    args = argparse.Namespace(**vars(get_args_parser().parse_args(flags)) | {"world_size": 2})
    log = [{"epoch": e, "test_acc1": a, "test_acc5": 90 + a / 100, "test_ema_acc1": 55.5, "test_ema_acc5": 99.5}
           for e, a in enumerate([10.0, 70.125, 60.0])]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    for epoch in range(3):
        torch.manual_seed(epoch)
        size = SIZE | ({"img_size": 32} if "--input-size" in flags else {})
        model = timm.create_model(args.model, num_classes=10, **size)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        state = checkpoints.assemble(
            model=model, model_ema=ModelEmaV3(model) if ema else None, optimizer=torch.optim.SGD(model.parameters()),
            scaler=None, epoch=epoch, step=0, meters={}, max_accuracy={}, args=args,
        )  # fmt: skip
        if ema:
            state["model_ema"]["head.bias"] = torch.full((10,), 7.0)
        checkpoints.save(state | changes, folder, is_best=epoch == 1)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("logs") / "run")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with serving(LocalHub()) as instance:
        use(instance, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield instance


def push(*words: object) -> None:
    push_to_hub.main([str(word) for word in words])


def assert_equal_weights(found: torch.nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(found.state_dict()), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("source", "weights", "accuracies"),
    [
        (".", "model", [70.125, 90.701]),  # a folder: its best epoch
        ("checkpoint.pth", "model", [60.0, 90.6]),
        (".", "model_ema", [55.5, 99.5]),
    ],
)
def test_the_folder_is_the_model_with_its_own_accuracies(
    source: str, weights: str, accuracies: list[float], run: Path, tmp_path: Path
) -> None:
    push(run / source, "ann/tiny", "--dry-run", tmp_path / "out", *(["--ema"] if weights == "model_ema" else []))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    file = run / ("checkpoint.pth" if source.endswith(".pth") else "best_checkpoint.pth")
    wanted = read_checkpoint(file)[weights]
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), wanted, rtol=0, atol=0)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert_equal_weights(model, wanted)
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == 1.0  # as the run was evaluated
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == accuracies
    assert card.data.datasets == ["uoft-cs/cifar10"] and card.data.license == "mit"
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert "| last epoch | 2 | 60.00 | 90.60 |" in card.text and "| best epoch | 1 | 70.12 |" in card.text


def test_the_card_says_what_the_remedy_learnt_what_it_costs_and_how_smooth_the_layers_are(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run")
    log = [json.loads(line) for line in (source / "log.txt").read_text().splitlines()]
    for line in log[:2]:
        line |= {"spectrum_hc_dc_mlp": [2.0, None], "spectrum_token_similarity": [0.1, 0.2]}
        line |= {"val_acc1": 90.0 - line["epoch"], "val_acc5": 95.0}
    log[2] |= {"val_acc1": 50.0, "val_acc5": 60.0, "spectrum_hc_dc_mlp": [1.0, 1.0]}
    (source / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    push(source, "ann/tiny", "--dry-run", tmp_path / "out")
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    weights = read_checkpoint(source / "best_checkpoint.pth")["model"]["blocks.1.lamb2"]
    row = f"| `blocks.1` | 24 | {weights.mean():.4f} | {weights.min():.4f} | {weights.max():.4f} |"
    assert row in text and "parameter of featscale, by head or channel" in text
    model = timm.create_model("featscale_small_12", num_classes=10, img_size=32, **SIZE)
    macs = count_macs(model, torch.zeros(1, 3, 32, 32))
    assert f"{macs / 1e9:.3g} GMACs an image" in text
    assert "| this file | 1 | 89.00 | 95.00 | held out |" in text  # of its own epoch, both splits
    assert "| best epoch | 0 | 10.00 | 90.10 | test |" in text  # as --val-split chose it
    assert "![similarity of the tokens and high-frequency energy by layer](spectrum.png)" in text
    assert Image.open(tmp_path / "out" / "spectrum.png").size[0] > 800

    tiny_tree(tmp_path / "images", train=1, val=3)
    push(source, "ann/tiny", "--dry-run", tmp_path / "measured", "--images", tmp_path / "images")
    assert "Of each block's output, on 3 images." in (tmp_path / "measured" / "README.md").read_text()


def test_a_card_without_a_log_has_what_the_checkpoint_knows(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run", max_accuracy={"acc1": 71.5})
    (source / "log.txt").unlink()
    push(source, "ann/tiny", "--dry-run", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Best top-1 of the run up to epoch 1: 71.50 %." in text and "Not measured (`--spectrum-every`" in text


def test_nothing_private_is_published_and_the_command_is_the_recipe(run: Path, tmp_path: Path) -> None:
    push(run, "ann/tiny", "--dry-run", tmp_path)
    for path in tmp_path.iterdir():
        assert b"secret" not in path.read_bytes() and str(run.parent).encode() not in path.read_bytes()
    text = ModelCard.load(tmp_path / "README.md").text
    [command] = [line for line in text.splitlines() if line.startswith("torchrun")]
    assert command.startswith("torchrun --nproc_per_node=2 main.py --data-path /path/to/data ")
    again = vars(get_args_parser().parse_args(shlex.split(command)[3:]))
    wanted = vars(get_args_parser().parse_args(FLAGS))
    assert {name: again[name] for name in model_card.RECIPE} == {name: wanted[name] for name in model_card.RECIPE}


def test_the_command_has_every_flag_that_training_depends_on() -> None:
    flags = [
        *("--opt", "muon", "--opt-kwargs", "nesterov=True", "ns_steps=6", "fallback_list=['head.*', '*.fc1.*']"),
        *("--unscale-lr", "--layer-decay", "0.7", "--lr-noise", "3", "4", "--three-augment", "--src"),
        *("--bce-loss", "--smoothing", "0", "--reprob", "0", "--repeated-aug-local"),
    ]
    trained = vars(get_args_parser().parse_args(flags))
    command = model_card.as_command(model_card.recipe(trained | {"remedy": {}}), 1)
    assert vars(get_args_parser().parse_args(shlex.split(command)[3:])) == trained | {"data_path": "/path/to/data"}
    elsewhere = {  # said otherwise, private, of other programs' data, or of evaluation
        *("num_classes", "remedy_kwargs", "teacher_path", "data_path", "resume", "finetune", "inat_category"),
        *("skip_bad_images", "start_epoch", "eval_crop_ratio", "eval", "eval_ema", "real_labels", "throughput"),
        *("list_models", "list_remedies", "device", "grad_checkpointing", "torchcompile", "model_ema_force_cpu"),
        *("spectrum_every", "cooldown_epochs", "patience_epochs"),
    }
    assert set(trained) == {*model_card.RECIPE} | NO_EFFECT | elsewhere


def test_a_value_of_the_recipe_that_looks_like_a_path_stays_at_home() -> None:
    trained = {
        "model": "/secret/x",
        "aa": "rand-m9",
        "model_kwargs": {"a": ["C:\\secret"]},
        "data_path": "x",
        "lr": 1.0,
    }
    assert model_card.recipe(trained) == {"aa": "rand-m9", "lr": 1.0}


def test_a_push_is_read_again_from_the_hub_and_keeps_a_readme(
    hub: LocalHub, run: Path, capsys: pytest.CaptureFixture
) -> None:
    push(run, "ann/tiny", "--private")
    assert "uploaded: http://127.0.0.1" in capsys.readouterr().out and hub.private == {"ann/tiny"}
    assert hub.repositories["ann/tiny"].keys() == {"README.md", "config.json", "model.safetensors"}
    best, last = (read_checkpoint(run / f"{name}.pth")["model"] for name in ("best_checkpoint", "checkpoint"))
    assert_equal_weights(timm.create_model("hf-hub:ann/tiny", pretrained=True), best)
    assert timm.create_model("hf-hub:ann/tiny", pretrained=True, num_classes=3).head.weight.shape == (3, 24)
    model = timm.create_model("featscale_small_12", num_classes=10, img_size=32, **SIZE)
    assert load_weights(model, read_checkpoint("hf-hub:ann/tiny")["model"], source="hub") == []
    assert_equal_weights(model, best)

    hub.add("ann/tiny", "README.md", b"my own words")
    push(run / "checkpoint.pth", "ann/tiny")
    assert "has a README.md, which stays" in capsys.readouterr().out
    assert hub.repositories["ann/tiny"]["README.md"] == b"my own words"
    assert_equal_weights(timm.create_model("hf-hub:ann/tiny", pretrained=True), last)


def test_a_repository_that_everyone_sees_gets_nothing_private(
    hub: LocalHub, run: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.add("ann/open", "notes.txt", b"")
    with pytest.raises(SystemExit):
        push(run, "ann/open", "--private")
    assert "--private: ann/open exists and is public" in capsys.readouterr().err
    assert hub.repositories["ann/open"].keys() == {"notes.txt"}


def test_a_model_of_timm_needs_no_import_and_an_unmeasured_file_claims_nothing(hub: LocalHub, tmp_path: Path) -> None:
    name = ("--model", "vit_tiny_patch16_224", "--input-size", "32", "--data-set", "IMNET")
    source = write_run(tmp_path / "run", flags=name, step=5)
    push(source, "ann/tiny", "--dry-run", tmp_path / "out", "--license", "cc0-1.0", "--model-kwargs",
         *(f"{key}={value}" for key, value in SIZE.items()))  # fmt: skip
    card = ModelCard.load(tmp_path / "out" / "README.md")
    hub.add("ann/old", "checkpoint.pth", (source / "checkpoint.pth").read_bytes())
    push("hf-hub:ann/old", "ann/tiny", "--dry-run", tmp_path / "again", "--model-kwargs",
         *(f"{key}={value}" for key, value in SIZE.items()))  # fmt: skip
    assert "Not recorded." in (tmp_path / "again" / "README.md").read_text()
    assert "oversmoothing.zoo" not in card.text and "trained on 10 classes of ImageNet-1k" in card.text
    assert card.data.eval_results is None and card.data.datasets is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert card.data.license == config["pretrained_cfg"]["license"] == "cc0-1.0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "tiny"], "tiny: is no name of a repository: write owner/name"),
        (["{run}/none.pth", "ann/tiny", "--dry-run", "{tmp}/out"], "none.pth: no such file"),
        (["{tmp}", "ann/tiny", "--dry-run", "{tmp}/out"], "holds neither best_checkpoint.pth nor checkpoint.pth"),
        (["{run}", "ann/tiny", "--dry-run", "{run}"], "is not empty: give a new folder"),
        (["{tmp}/bare.pth", "ann/tiny", "--dry-run", "{tmp}/out"], "give --model (--model-kwargs)"),
        (["{tmp}/bare.pth", "ann/tiny", "--dry-run", "{tmp}/out", "--model", "deit_tiny_12"], "does not fit the model"),
        (
            ["{tmp}/bare.pth", "ann/tiny", "--dry-run", "{tmp}/out", "--model", "x", "--ema"],
            "model x, which is not known",
        ),
        (["{run}", "ann/tiny"], "not logged in to the Hub: `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_writes_nothing(
    words: list[str], message: str, run: Path, tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    torch.save({"head.weight": torch.zeros(3, 4)}, tmp_path / "bare.pth")
    with pytest.raises(SystemExit) as left:
        push(*(word.format(run=run, tmp=tmp_path) for word in words))
    assert left.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not hub.requests


def test_a_refused_upload_is_one_sentence(
    hub: LocalHub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(SystemExit):
        push(run, "ann/tiny")
    assert "the upload failed (HfHubHTTPError: " in capsys.readouterr().err.splitlines()[-1]
    assert not hub.repositories


@pytest.mark.slow
def test_the_script_uploads_from_any_folder(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "push_to_hub.py"), str(run), "ann/tiny"]
    variables = environment(HF_TOKEN="hf_secret", **hub.environment(tmp_path))
    done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "uploaded: " in done.stdout, done.stderr
    wanted = read_checkpoint(run / "best_checkpoint.pth")["model"]
    assert_equal_weights(timm.create_model("hf-hub:ann/tiny", pretrained=True), wanted)
