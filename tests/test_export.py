"""scripts/export.py: the exported weights equal the checkpoint's, and the JSON file says how to build the model."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

import checkpoints
from weights import load_weights

SCRIPT = Path(checkpoints.__file__).resolve().parent / "scripts" / "export.py"
main = runpy.run_path(str(SCRIPT), run_name="export")["main"]
SIZE = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """An output folder with one checkpoint whose EMA differs from its weights."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SIZE)
    model_ema = ModelEmaV3(model)
    model.head.weight.data.normal_()
    args = argparse.Namespace(
        model="vit_tiny_patch16_224", model_kwargs={k: v for k, v in SIZE.items() if k != "img_size"}, input_size=32
    )
    state = checkpoints.assemble(
        model=model, model_ema=model_ema, optimizer=torch.optim.AdamW(model.parameters()), scaler=None, epoch=4, step=0,
        meters={}, max_accuracy={"acc1": 55.5}, args=args,
    )  # fmt: skip
    checkpoints.save(state, tmp_path)
    return tmp_path


@pytest.mark.parametrize("weights", ["model", "model_ema"])
def test_the_export_rebuilds_the_model(run_folder: Path, weights: str) -> None:
    flags = ["--ema"] if weights == "model_ema" else []
    main(["--checkpoint", str(run_folder / "checkpoint.pth"), "--output", str(run_folder / "out.safetensors"), *flags])
    checkpoint = checkpoints.read(run_folder / "checkpoint.pth")
    exported = load_file(run_folder / "out.safetensors")
    torch.testing.assert_close(exported, checkpoint[weights], rtol=0, atol=0)

    about = json.loads((run_folder / "out.json").read_text())
    assert (about["epoch"], about["max_accuracy"], about["weights"]) == (4, {"acc1": 55.5}, weights)
    model = timm.create_model(
        about["model"], num_classes=about["num_classes"], img_size=about["input_size"], **about["model_kwargs"]
    )
    read_again = checkpoints.read(run_folder / "out.safetensors")["model"]
    assert load_weights(model, read_again, source="out.safetensors") == []


@pytest.mark.parametrize(
    ("source", "output", "flags", "message"),
    [
        ("bare.pth", "x.safetensors", ["--ema"], "has no EMA weights: leave --ema out"),
        ("none.pth", "x.safetensors", [], "none.pth: no such file"),
        ("bare.pth", "x.pth", [], "x.pth: must end in .safetensors"),
        ("bare.pth", "none/x.safetensors", [], "No such file or directory"),
    ],
)
def test_a_wrong_argument_is_one_line_and_writes_nothing(
    source: str, output: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save({"head.weight": torch.zeros(3, 4)}, tmp_path / "bare.pth")
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(tmp_path / source), "--output", str(tmp_path / output), *flags])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("x.*"))


def test_a_bare_state_dict_is_described_by_what_it_shows(tmp_path: Path) -> None:
    torch.save({"module.head.weight": torch.zeros(3, 4)}, tmp_path / "bare.pth")
    main(["--checkpoint", str(tmp_path / "bare.pth"), "--output", str(tmp_path / "x.safetensors")])
    about = json.loads((tmp_path / "x.json").read_text())
    assert about["num_classes"] == 3 and about["model"] is None
    assert list(load_file(tmp_path / "x.safetensors")) == ["head.weight"]


@pytest.mark.slow
def test_the_script_runs_from_any_folder(run_folder: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--checkpoint", "checkpoint.pth", "--output", "out.safetensors"]
    result = subprocess.run(command, cwd=run_folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("wrote out.safetensors and out.json") and (run_folder / "out.json").exists()
