"""Scripts refuse as main.py does: one line with "error:", exit code 2, and no traceback."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import tiny_tree

from scripts import analyze, benchmark, export, plot_log, prepare_wds

SIZE = ("--model-kwargs", "embed_dim=48", "depth=2", "num_heads=3", "patch_size=8")
ANALYZED = ("--model", "attnscale_tiny_12", *SIZE, "--input-size", "32", "--device", "cpu", "--num-images", "2")
MEASURED = ("--model", "attnscale_tiny_12", *SIZE, "--img-size", "32", "--num-bench-iter", "1", "--num-warm-iter", "0")


def refused(command: Callable[[], int], words: tuple, monkeypatch, capsys: pytest.CaptureFixture) -> str:
    """The line with which a command refuses ``words``."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    try:
        code = command()
    except SystemExit as left:  # argparse's way out
        code = left.code
    errors = capsys.readouterr().err.splitlines()
    assert code == 2, errors
    found = [line for line in errors if "error: " in line]
    assert len(found) == 1, errors
    return found[0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--device", "foo"), "--device 'foo'"),
        (("--device", "cuda:77"), "--device cuda:77"),
        (("--num-images", "-1"), "--num-images -1"),
        (("--seed", "-1"), "--seed -1"),
        (("--input-size", "4"), "images of 4 pixels"),
        (("--input-size", "0"), "--input-size 0"),
        (("--eval-crop-ratio", "nan"), "--eval-crop-ratio nan"),
        (("--layer", "9", "--image", "{tree}/val/class_0/0000.jpeg"), "--layer 9"),
        (("--image", "{tree}/none.jpeg"), "none.jpeg"),
        (("--output_dir", "{tree}/val/class_0/0000.jpeg"), "0000.jpeg is a file): give another folder"),
        (("--model", "foo"), "--model foo"),
        (("--model", "deit_tiny_12", "--model-kwargs", "depth"), "KEY=VALUE"),
        (("--model", "deit_tiny_12", "--model-kwargs", "depth=0", "embed_dim=48", "num_heads=3"), "no block with"),
        (("--model", "deit_tiny_12", "--resume", "{tree}/none.pth"), "none.pth"),
    ],
)
def test_analyze(words: tuple, named: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    tree = tiny_tree(tmp_path, train=3, val=3)
    given = ("--data-path", tree / "val", "--output_dir", tmp_path / "out", *ANALYZED)
    more = [word.format(tree=tree) for word in words]
    assert named in refused(analyze.cli, (*given, *more), monkeypatch, capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--model", "foo"), "--model foo"),
        (("--model", "resnet10t"), "--model resnet10t"),
        (("--compare", "deit_tiny_12", "foo"), "--compare foo"),
        (("--img-size", "5"), "--img-size 5: smaller than a patch"),
        (("--img-size", "0"), "--img-size 0"),
        (("-b", "0"), "--batch-size 0"),
        (("--rounds", "-1"), "--rounds -1"),
        (("--num-bench-iter", "0"), "--num-bench-iter 0"),
        (("--num-warm-iter", "-1"), "--num-warm-iter -1"),
        (("--threads", "2", "0"), "--threads 2 0"),
        (("--device", "foo"), "--device 'foo'"),
        (("--device", ""), "--device ''"),
        (("--only", "foo"), "--only foo: no table foo"),
        (("--model-kwargs", "depth"), "KEY=VALUE"),
        (("--model-kwargs", "depth=x"), "--model attnscale_tiny_12 cannot be built"),
        (("--results-file", "/nowhere/x.json"), "--results-file /nowhere/x.json"),
        (("--plot", "x.foo"), "--plot x.foo"),
        (("--read", "/nowhere/x.json"), "/nowhere/x.json"),
        (("--read", __file__), "holds no models table"),
    ],
)
def test_benchmark(words: tuple, named: str, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    assert named in refused(benchmark.cli, (*MEASURED, *words), monkeypatch, capsys)


@pytest.mark.parametrize("value", ["-1", "x", "4294967296", "1.5"])
def test_prepare_wds(value: str, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    words = ("--data-path", "/nowhere", "--output", "/nowhere", "--seed", value)
    assert "give a whole number from 0 to" in refused(prepare_wds.main, words, monkeypatch, capsys)


LINE = {"epoch": 0, "train_loss": 2.0, "train_lr": 0.1, "test_loss": 1.0, "test_acc1": 50.0}


@pytest.mark.parametrize(
    ("change", "words", "named"),
    [
        ({"test_acc1": "high"}, (), "line 1 is not an epoch"),
        ({"test_loss": [1]}, (), "line 1 is not an epoch"),
        ({"train_lr": True}, (), "line 1 is not an epoch"),
        ({"epoch": "one"}, (), "line 1 is not an epoch"),
        ({"epoch": 1e300}, (), "line 1 is not an epoch"),
        ({}, ("--output", "{folder}/curves.foo"), "curves.foo: give a file that ends in .png"),
        ({}, ("--output", "{folder}"), "give a file that ends in .png"),
    ],
)
def test_plot_log(
    change: dict, words: tuple, named: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "log.txt").write_text(json.dumps(LINE | change) + "\n")
    more = [word.format(folder=tmp_path) for word in words]
    assert named in refused(plot_log.main, (tmp_path, *more), monkeypatch, capsys)


def test_plot_log_draws_dollar_signs_and_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    """Neither mathematics in a name nor a NaN in a column ends it."""
    folder = tmp_path / "a$_{x$b"
    folder.mkdir()
    lines = [LINE, LINE | {"epoch": 1, "test_acc1": float("nan"), "train_loss": float("inf")}, {"epoch": 2}]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_log.main([str(folder), "--title", "$\\frac{$"]) == 0
    assert (folder / "curves.png").stat().st_size > 10000
    assert "test_acc1" not in plot_log.read_log(folder)[1]


def test_an_export_leaves_somebody_else_s_description_alone(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    """package.safetensors comes with a package.json, a name that others use; its own it writes again."""
    torch.save({"head.weight": torch.zeros(3, 4)}, tmp_path / "bare.pth")
    words = ("--checkpoint", tmp_path / "bare.pth", "--output", tmp_path / "package.safetensors")
    theirs = tmp_path / "package.json"
    for content in ('{"name": "mine"}', "[]", "no json", ""):
        theirs.write_text(content)
        assert "would overwrite" in refused(export.main, words, monkeypatch, capsys)
        assert theirs.read_text() == content and not (tmp_path / "package.safetensors").exists()
    theirs.unlink()
    for _ in range(2):
        export.main([str(word) for word in words])
    assert json.loads(theirs.read_text())["num_classes"] == 3
