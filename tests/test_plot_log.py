"""scripts/plot_log.py: the picture shows every run, and what cannot be drawn is named."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor
from runs import ROOT

from oversmoothing.analysis import figures

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "plot_log.py"), run_name="plot_log")
main, read_log, run_names, LogError = (SCRIPT[name] for name in ("main", "read_log", "run_names", "LogError"))
COLOURS = figures.COLOURS


def write_log(folder: Path, epochs: int, best: float = 80.0, **more: float) -> Path:
    """A log whose accuracy rises to ``best`` at three quarters and falls a little after."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for epoch in range(epochs):
        done = (epoch + 1) / epochs
        line = {"train_loss": 7 - 4 * done, "train_lr": 1e-3 * (1 + math.cos(math.pi * done)) / 2}
        line |= {"test_loss": 7 - 6 * done, "test_acc1": best - 40 * abs(done - 0.75), "test_acc5": 90.0}
        lines.append(json.dumps(line | more | {"epoch": epoch, "n_parameters": 22}) + "\n")
    (folder / "log.txt").write_text("".join(lines))
    return folder


def colours_in(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 600
        return set(map(tuple, np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).tolist()))


def test_it_starts_without_torch() -> None:
    code = "import sys, scripts.plot_log; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("epochs", [1, 2, 500])
def test_a_run_of_any_length_is_drawn(epochs: int, tmp_path: Path, capsys) -> None:
    folder = write_log(tmp_path / "run", epochs)
    assert main([str(folder)]) == 0
    assert ImageColor.getrgb(COLOURS[0]) in colours_in(folder / "curves.png")
    printed = capsys.readouterr().out
    assert f"run: {epochs} epoch(s), top-1 best" in printed and f"wrote {folder / 'curves.png'}" in printed


def test_a_plain_run_and_its_variants_are_drawn_side_by_side(tmp_path: Path, capsys) -> None:
    runs = [write_log(tmp_path / "deit_small_12", 300, 79.8), write_log(tmp_path / "attnscale_small_12", 300, 80.7)]
    runs.append(write_log(tmp_path / "unfinished", 40, 60.0, test_ema_acc1=50.0, test_ema_loss=2.0))
    output = tmp_path / "new" / "folder" / "curves.png"
    assert main([*map(str, runs[:2]), str(runs[2] / "log.txt"), "--output", str(output), "--title", "DeiT-S"]) == 0
    assert {ImageColor.getrgb(colour) for colour in COLOURS[:3]} <= colours_in(output)
    printed = capsys.readouterr().out
    assert "deit_small_12: 300 epoch(s), top-1 best 79.80% (epoch 224)" in printed
    assert "attnscale_small_12: 300 epoch(s), top-1 best 80.70% (epoch 224)" in printed
    assert "unfinished: 40 epoch(s)" in printed


def test_a_log_without_evaluation_is_drawn(tmp_path: Path, capsys) -> None:
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 2.0, "train_lr": 0.1}\n')
    assert main([str(tmp_path)]) == 0
    assert "not evaluated" in capsys.readouterr().out


def test_a_last_line_cut_short_is_left_out_and_a_repeated_epoch_counts_once(tmp_path: Path) -> None:
    path = write_log(tmp_path, 3) / "log.txt"
    first, second, third = path.read_text().splitlines()
    again = json.dumps(json.loads(second) | {"test_acc1": 1.0})
    path.write_text("\n".join([first, second, again, third, third[:20]]))
    epochs = read_log(path)
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    assert epochs[1]["test_acc1"] == 1.0


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert run_names([tmp_path / "a", tmp_path / "b" / "log.txt"]) == ["a", "b"]
    assert run_names([tmp_path / "a" / "seed0", tmp_path / "b" / "seed0"]) == ["a/seed0", "b/seed0"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such file"), ("", "holds no epoch yet"), ("hello\n", "line 1 is not an epoch"),
     ('{"loss": 1}\n', "line 1 is not an epoch"), ('{"epoch": 0}\nx\n{"epoch": 1}\n', "line 2 is not an epoch")],
)  # fmt: skip
def test_a_log_that_cannot_be_drawn_is_named(content: str | None, complaint: str, tmp_path: Path, capsys) -> None:
    if content is not None:
        (tmp_path / "log.txt").write_text(content)
    assert main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {tmp_path / 'log.txt'}: ") and complaint in errors and errors.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()
    with pytest.raises(LogError):
        read_log(tmp_path)


def test_names_have_to_fit(tmp_path: Path, capsys) -> None:
    folder = str(write_log(tmp_path, 2))
    assert main([folder, "--names", "a", "b"]) == 2
    assert "--names a b: 2 names for 1 runs" in capsys.readouterr().err
    assert main([folder, folder]) == 2
    assert "a name twice" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, capsys) -> None:
    folder = write_log(tmp_path, 2)
    (tmp_path / "file").touch()
    assert main([str(folder), "--output", str(tmp_path / "file" / "curves.png")]) == 2
    assert "file" in capsys.readouterr().err
