"""DeiT III's recipe: its scripts, its network, and a run that was stopped and ends with the bits of one left alone.

Flags apart from one another: the loss in test_losses.py, LAMB and the rate in test_optim.py, crops and ThreeAugment in
test_datasets.py and test_fastload.py.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from ranks import Ranks
from runs import ROOT, Run, environment, expect
from test_resume import assert_same_results
from timm.layers import DropPath, LayerScale

import build
import checkpoints
import entry
import optim
import oversmoothing
import preflight
from options import check_args, get_args_parser
from oversmoothing.weights import read_checkpoint
from reporting import EpochLog
from scripts.prepare_digits import prepare_digits

MODELS = {  # by script
    "deit3_small_12": "deit_small_12",
    "deit3_base_12": "deit_base_12",
    "attnscale_deit3_small_12": "attnscale_small_12",
    "attnscale_deit3_base_12": "attnscale_base_12",
}


def script(name: str) -> Path:
    return ROOT / "scripts" / "reproduce" / f"{name}.sh"


def flags(name: str) -> list[str]:
    """Those of ``main.py`` in a script."""
    text = script(name).read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("torchrun "))
    return line.partition("main.py ")[2].replace('"$DATA_PATH"', "data").replace(' "$@"', "").split()


def parsed(name: str) -> argparse.Namespace:
    args = get_args_parser().parse_args(flags(name))
    check_args(args)
    return args


# ---- the recipe ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_script_holds_the_recipe(name: str) -> None:
    args = parsed(name)
    base = "base" in name
    preflight.check_flags(args, world_size=8)
    assert args.model == MODELS[name] and args.output_dir == f"./logs/imnet1k_{name}"
    assert (args.epochs, 8 * args.batch_size) == (800, 2048)
    assert (args.opt, args.weight_decay, args.clip_grad, args.drop_path) == ("lamb", 0.05, None, 0.2 if base else 0.05)
    assert (args.mixup, args.cutmix, args.smoothing, args.bce_loss) == (0.8, 1.0, 0.0, True)
    assert (args.three_augment, args.color_jitter, args.reprob, args.src) == (True, 0.3, 0.0, False)
    assert (args.repeated_aug, args.eval_crop_ratio, args.input_size) == (True, 1.0, 224)
    plan = optim.LRPlan(args, world_size=8)
    assert plan(0) == 1e-6 and plan(799) == pytest.approx(1e-5, rel=1e-2)
    assert max(map(plan, range(800))) == plan(6) == pytest.approx(3e-3 if base else 4e-3, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_script_states_what_to_expect_and_asks_for_its_paths(name: str, tmp_path: Path) -> None:
    head = script(name).read_text().split("set -euo pipefail")[0]
    assert f"{83.8 if 'base' in name else 81.4}% top-1, as reported by the paper" in head.replace("\n# ", " ")
    assert "arXiv 2204.07118" in head and "Never run here" in head
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", script(name)], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "DATA_PATH: set it to" in done.stderr and done.stdout == ""


# ---- the network -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["small", "base"])
def test_the_network_takes_the_weights_of_timms_deit3(size: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"deit3_{size}_patch16_224").state_dict()
        ours = build.build_model(parsed(f"deit3_{size}_12"), 1000).state_dict()
        remedied = build.build_model(parsed(f"attnscale_deit3_{size}_12"), 1000).state_dict()
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    assert {name: tensor.shape for name, tensor in ours.items()} == shapes
    added = {name for name in remedied if oversmoothing.is_remedy_parameter(name)}
    assert {name: tensor.shape for name, tensor in remedied.items() if name not in added} == shapes
    assert added == {f"blocks.{i}.attn.lamb" for i in range(12)}


def test_the_network_starts_as_deit_iiis_and_drops_paths_alike_in_all_blocks() -> None:
    torch.manual_seed(0)
    model = build.build_model(parsed("attnscale_deit3_small_12"), 1000)
    assert model.pos_embed.shape == (1, 196, 384)  # the class token has none
    branches = [block.get_submodule(name) for block in model.blocks for name in ("attn.qkv", "attn.proj", "mlp.fc1")]
    drawn = [model.cls_token, model.pos_embed, model.head.weight, *(layer.weight for layer in branches)]
    assert all(weight.std().item() == pytest.approx(0.02, rel=0.1) for weight in drawn)
    scales = [module.gamma for module in model.modules() if isinstance(module, LayerScale)]
    assert len(scales) == 24 and all((gamma == 1e-4).all() for gamma in scales)
    drops = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert drops == 24 * [0.05]

    optimizer = optim.build_optimizer(parsed("attnscale_deit3_small_12"), model, 4e-3)
    no_decay, decay = ({id(parameter) for parameter in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]
    for name, parameter in model.named_parameters():
        assert (id(parameter) in no_decay) == (parameter.ndim == 1 or name in ("cls_token", "pos_embed")), name


@pytest.mark.parametrize("name", ["deit_small_12", "featscale_small_12"])
def test_uniform_drop_path_drops_each_branch_of_each_block_at_the_one_rate(name: str) -> None:
    size = dict(img_size=32, patch_size=8, embed_dim=12, num_heads=3)
    linear = timm.create_model(name, **size, depth=3, drop_path_rate=0.4)
    assert [block.drop_path1.drop_prob for block in linear.blocks[1:]] == pytest.approx([0.2, 0.4])
    model = timm.create_model(name, **size, depth=1, drop_path_rate=0.4, uniform_drop_path=True)
    torch.nn.init.normal_(model.blocks[0].mlp.fc2.bias)
    torch.nn.init.normal_(model.blocks[0].attn.proj.bias)
    torch.manual_seed(0)
    x = torch.randn(1, 17, 12).expand(2000, 17, 12)
    outcomes, counts = model.blocks[0](x).flatten(1).round(decimals=4).unique(dim=0, return_counts=True)
    assert len(outcomes) == 4  # neither branch, one of them, both
    expected = torch.tensor([0.16, 0.24, 0.24, 0.36])
    torch.testing.assert_close(counts.sort().values / 2000, expected, rtol=0, atol=0.03)


# ---- a run -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_recipe_stopped_in_the_middle_ends_with_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    """On 80 digits in two processes: the script as it is launched, then the same flags with a signal in epoch 1."""
    prepare_digits(tmp_path / "digits", 1, 18)
    for image in tmp_path.glob("digits/val/*/*[1-9].png"):
        image.unlink()
    name, epochs = "attnscale_deit3_small_12", 3
    kwargs = [word for word in flags(name) if "=" in word]
    short = ["--model-kwargs", *kwargs, "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8", "--input-size", "40"]
    short += ["--batch-size", "8", "--epochs", str(epochs), "--warmup-epochs", "1", "--drop-path", "0.2"]
    short += ["--num_workers", "0", "--device", "cpu", "--print-freq", "1", "--model-ema-decay", "0.9"]
    folders = whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in folders:
        folder.mkdir()

    env = environment(
        PATH=f"{Path(sys.executable).parent}:{environment()['PATH']}", DATA_PATH=str(tmp_path / "digits"), NUM_GPUS="2"
    )
    with Run(["bash", str(script(name)), *short, "--output_dir", str(whole)], env, cwd=tmp_path) as run:
        output = expect(run).stdout
    assert "2 process(es) on CPU" in output and "base 0.004 = 0.004 whatever the batch (--unscale-lr)" in output
    log = EpochLog.read(whole / "log.txt")
    assert len(log) == epochs and all(line["train_loss"] < 0.75 for line in log)  # of each class; ln 2 = 0.69 at first
    checkpoint = read_checkpoint(whole / checkpoints.CURRENT)
    assert checkpoint["optimizer_class"] == "Lamb"
    lambdas = [tensor for key, tensor in checkpoint["model"].items() if oversmoothing.is_remedy_parameter(key)]
    assert len(lambdas) == 2 and all(tensor.abs().max() > 0 for tensor in lambdas)

    again = (*flags(name), *short, "--num_workers", "1", "--data-path", tmp_path / "digits", "--output_dir", stopped)
    with Ranks(*again, folder=stopped) as run:
        run.wait_for("Epoch: [1]  [1/")
        run.signal(signal.SIGTERM, rank=1)
        run.expect(entry.EXIT_PREEMPTED)
    with Ranks(*again, folder=stopped) as run:
        assert "auto-reload: continuing from" in run.expect(0)
    assert_same_results(stopped, whole, epochs=epochs)
