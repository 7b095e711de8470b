"""--remedy: any model with any remedy through main.py, and everything that follows a run's checkpoint."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import call_main, tiny_tree

import oversmoothing
from oversmoothing.weights import model_from_checkpoint, read_checkpoint
from scripts import analyze, export

MODEL = (
    *("--model", "vit_tiny_patch16_224", "--model-kwargs", "embed_dim=32", "depth=3", "num_heads=2", "patch_size=8"),
    *("--input-size", "32"),
)
RUN = (
    *MODEL,
    *("--data-set", "FOLDER", "--batch-size", "4", "--epochs", "2", "--warmup-epochs", "0", "--num_workers", "0"),
    *("--device", "cpu"),
)
GFSA = ("--remedy", "gfsa", "neutreno", "--remedy-kwargs", "gfsa.K=3", "gfsa.layers=1:")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("data") / "tree")


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A finished run with two remedies."""
    folder = data.parent / "run"
    call_main(
        *RUN, *GFSA, "--data-path", data, "--output_dir", folder, "--spectrum-every", "1", "--keep-checkpoints", "2"
    )
    return folder


def test_a_run_trains_its_remedies_and_logs_them(run: Path) -> None:
    checkpoint = read_checkpoint(run / "checkpoint.pth")
    added = {name: tensor for name, tensor in checkpoint["model"].items() if oversmoothing.is_remedy_parameter(name)}
    assert set(added) == {f"blocks.{i}.attn.{name}" for i in (1, 2) for name in ("gfsa_beta", "neutreno_alpha")}
    assert all(tensor.abs().max() > 0 for tensor in added.values())
    assert checkpoint["args"]["remedy"]["gfsa"] == {"K": 3, "beta": 0.0, "learnable": True, "layers": "1:"}
    line = json.loads((run / "log.txt").read_text().splitlines()[-1])
    assert "spectrum_gfsa_beta" in line and len(line["spectrum_token_similarity"]) == 3


def test_evaluation_follows_the_checkpoint(run: Path, data: Path) -> None:
    line = json.loads((run / "log.txt").read_text().splitlines()[-1])
    words = (*RUN, "--data-path", data, "--eval", "--resume", run / "checkpoint.pth")
    printed = call_main(*words).stdout
    assert "--remedy gfsa neutreno, as " in printed
    assert re.search(rf"\b{line['test_acc1']:.3f}%", printed)
    again = call_main(*words, *GFSA).stdout  # as said by the flags
    assert "as " + str(run) not in again and f"{line['test_acc1']:.3f}%" in again


def test_a_resumed_run_equals_one_that_was_not_stopped(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(run / "checkpoint_0000.pth", tmp_path / "checkpoint.pth")
    words = (*RUN, *GFSA, "--data-path", data, "--output_dir", tmp_path, "--auto_reload")
    assert "auto-reload: continuing from" in call_main(*words).stdout
    whole, parts = (read_checkpoint(folder / "checkpoint.pth") for folder in (run, tmp_path))
    for name in ("model", "model_ema"):
        assert whole[name].keys() == parts[name].keys()
        assert all(torch.equal(tensor, parts[name][key]) for key, tensor in whole[name].items())


def test_plain_weights_start_a_run_with_a_remedy(data: Path, tmp_path: Path) -> None:
    call_main(*RUN, "--data-path", data, "--output_dir", tmp_path / "plain", "--epochs", "1")
    words = ("--data-path", data, "--output_dir", tmp_path / "run", "--finetune", tmp_path / "plain" / "checkpoint.pth")
    printed = call_main(*RUN, *words, "--remedy", "attnscale", "--epochs", "1").stdout
    assert "left at initial value: blocks.*.attn.lamb (3)" in printed


def test_scripts_follow_the_checkpoint(run: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(run / "checkpoint.pth")
    model = model_from_checkpoint(checkpoint, source="run")
    assert list(oversmoothing.remedies_of(model)) == ["gfsa", "neutreno"]
    words = ["--data-path", str(data), "--num-images", "2", "--output_dir", str(tmp_path / "analysis")]
    words += ["--model", "vit_tiny_patch16_224", "--resume", str(run / "checkpoint.pth")]
    analyze.main(analyze.get_parser().parse_args(words))
    rows = (tmp_path / "analysis" / "analysis.csv").read_text()
    assert "gfsa_beta" in rows and "neutreno_alpha" in rows
    export.main(["--checkpoint", str(run / "checkpoint.pth"), "--output", str(tmp_path / "model.pt2")])
    images = torch.randn(3, 3, 32, 32)
    exported = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(exported(images), model.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--remedy", "attnscal"), "there is no remedy 'attnscal'; did you mean attnscale"),
        (("--remedy", "gfsa", "--remedy-kwargs", "depth=3"), "gfsa has no option depth"),
        (("--remedy-kwargs", "K=3"), "name a remedy"),
        (("--remedy", "attnscale", "--remedy-kwargs", "layers=7:"), "chooses none of the model's 3 layers"),
        (("--model", "attnscale_small_12", "--remedy", "gfsa"), "attnscale built in"),
        (("--model", "xcit_nano_12_p16_224", "--model-kwargs", "--remedy", "attnscale"), "maps are between channels"),
        (("--model", "resnet10t", "--model-kwargs", "--remedy", "attnscale"), "no block with a self-attention module"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_data_is_read(flags: tuple[str, ...], message: str) -> None:
    done = call_main(*RUN, "--data-path", "/nowhere", *flags, code=2)
    assert message in done.stderr and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
