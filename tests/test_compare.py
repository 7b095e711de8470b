"""scripts/compare.py: a small study through the real launch command, killed and continued; flags; the queue."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from runs import Run, call_main, environment, expect, tiny_tree
from slurm import Slurm
from studies import ARMS, FLAGS, study_of, write_run

import options
from scripts import compare, run_with_submitit
from scripts.comparison.launch import Queue
from scripts.comparison.records import find_folder, is_finished, read_record
from scripts.comparison.run import make_runs
from scripts.comparison.study_file import read_study

STUDY = """
title = "Two arms, two seeds"
seeds = 2
[flags]
data-set = "FOLDER"
data-path = "{data}"
input-size = 32
batch-size = 4
epochs = 3
model-kwargs = {{ embed_dim = 32, depth = 2, num_heads = 2, patch_size = 8 }}
warmup-epochs = 0
num_workers = 0
device = "cpu"
print-freq = 1
spectrum-every = 3
[arms.plain]
model = "deit_small_12"
[arms.attnscale]
model = "attnscale_small_12"
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    data = tiny_tree(tmp_path / "data", train=32)
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(data=data))
    return path


@pytest.mark.slow
def test_a_study_that_is_killed_three_times_ends_with_the_numbers_of_runs_that_were_not(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Killed by SIGKILL, within a run; nobody passes that on to the run but the kernel."""
    out = tmp_path / "out"
    runs = read_study(study).runs()
    words = [sys.executable, "scripts/compare.py", str(study), "--output_dir", str(out), "--jobs", "1"]
    for run in runs[:3]:
        with Run(words, environment()) as killed:
            console = out / "runs" / run.folder / "console.txt"
            deadline = time.monotonic() + 120
            while "Epoch: [1]" not in (console.read_text() if console.exists() else ""):
                assert killed.process.poll() is None and time.monotonic() < deadline, killed.output
                time.sleep(0.05)
            os.kill(killed.process.pid, signal.SIGKILL)
            killed.process.wait()
    assert [is_finished(out / "runs" / run.folder) for run in runs] == [True, True, False, False]
    assert compare.cli([str(study), "--output_dir", str(out), "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 runs are there already" in printed and "[4/4 runs, 100% of the epochs" in printed
    assert "auto-reload: continuing from" in console.read_text()

    # The same flags, one process after the other, never stopped.
    epochs = pd.read_csv(out / "results.csv")
    for run in runs:
        folder = tmp_path / "alone" / run.folder
        call_main(*run.words(folder))
        expected = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        rows = epochs[(epochs["arm"] == run.arm) & (epochs["seed"] == run.seed)]
        for name in ("epoch", "train_loss", "test_loss", "test_acc1", "n_parameters"):
            assert rows[name].tolist() == [line[name] for line in expected], (run.folder, name)
    assert (out / "report.html").exists() and "attnscale against plain" in (out / "table.md").read_text()
    # Asked again, it makes nothing.
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/log.txt")}
    assert compare.cli([str(study), "--output_dir", str(out)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/log.txt")}


def test_the_flags_are_none_of_main_s() -> None:
    """Or one of the two would never get its value."""

    def spellings(parser) -> set[str]:
        return {spelling for action in parser._actions for spelling in action.option_strings} - {"-h", "--help"}

    shared = spellings(compare.get_parser()) & spellings(options.get_args_parser())
    assert shared == {"--output_dir", "--output-dir"}  # of the study, which gives each run a folder in it


def test_the_runs_can_be_listed_without_making_any(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    write_run(out / "runs", read_study(study).runs()[0], 50.0)
    assert compare.cli([str(study), "--output_dir", str(out), "--list", "--lr", "5e-4"]) == 0  # the default
    first, *others = capsys.readouterr().out.splitlines()
    assert len(others) == 3 and "(done): main.py --data-set FOLDER" in first and "(epoch 0 of 3)" in others[0]
    assert compare.cli([str(study), "--output_dir", str(out), "--list", "--seeds", "1", "--epochs", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("(epoch 0 of 5)" in line for line in lines)  # other runs


def test_the_report_alone_is_of_the_runs_that_are_there(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert compare.cli([str(study), "--output_dir", str(out), "--report"]) == 2
    assert "no run of this study is finished yet" in capsys.readouterr().err
    for run in read_study(study).runs():
        write_run(out / "runs", run, 50.0 + run.seed)
    assert compare.cli([str(study), "--output_dir", str(out), "--report"]) == 0
    assert f"wrote {out / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    ([], "give either a study's TOML file or arms"),
    (["x.toml", "--arm", "a=--lr 1"], "give either a study's TOML file or arms"),
    (["x.toml"], "x.toml: cannot be read"),
    (["--arm", "a=--model deit_small_12", "--seeds", "0"], "--seeds 0: give 1 or more"),
    (["--arm", "a=--model deit_small_12", "--jobs", "0"], "--jobs 0: give 1 or more"),
    (["--arm", "a=--model deit_smal_12"], "the command line, arms.a: --model deit_smal_12: no such model"),
    (["--arm", "a=", "--lrr", "3"], "--lrr 3: main.py has no such flag"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert compare.cli(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error


class QueuedJob:
    """A job of submitit that has finished when it is asked."""

    job_id = "7"

    def done(self) -> bool:
        return True

    def exception(self) -> None:
        return None


def test_runs_can_be_queued_as_run_with_submitit_queues_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(seeds=1, arms=ARMS)
    submitted = []

    def submit(words: list[str]) -> tuple[QueuedJob, str]:
        job, flags = run_with_submitit.get_args_parser().parse_known_args(words)
        args = options.get_args_parser().parse_args(flags)
        run_with_submitit.check(job, args)
        submitted.append((job.ngpus, job.partition, job.job_dir.name, args.model))
        [run] = [run for run in study.runs() if run.args.model == args.model]
        record = read_record(find_folder(tmp_path, run))
        write_run(tmp_path, run, 50.0)
        (find_folder(tmp_path, run) / "run.json").write_text(json.dumps(record))
        return QueuedJob(), "slurm"

    monkeypatch.setattr(run_with_submitit, "submit", submit)
    launcher = Queue(["--ngpus", "1", "--partition", "gpu"])
    assert make_runs(study.runs(), tmp_path, launcher) == []
    assert submitted == [(1, "gpu", "submitit", "deit_small_12"), (1, "gpu", "submitit", "attnscale_small_12")]
    assert FLAGS["epochs"] == 2 and all(is_finished(find_folder(tmp_path, run)) for run in study.runs())


@pytest.mark.slow
def test_a_killed_comparison_finds_its_job_in_the_queue(study: Path, tmp_path: Path) -> None:
    """Under the emulated Slurm: the job goes on without ``compare.py``, and is not queued a second time."""
    out = tmp_path / "out"
    words = [sys.executable, "scripts/compare.py", str(study), "--output_dir", str(out), "--seeds", "1"]
    words += ["--only", "plain", "--submitit", "--ngpus 0 --mem 2G"]
    with Slurm(tmp_path / "slurm") as slurm:
        with Run(words, environment(**slurm.variables)) as killed:
            deadline = time.monotonic() + 120
            while not (records := list(out.glob("runs/*/run.json"))) or "job" not in read_record(records[0].parent):
                assert killed.process.poll() is None and time.monotonic() < deadline, killed.output
                time.sleep(0.05)
            os.kill(killed.process.pid, signal.SIGKILL)
            killed.process.wait()
        with Run(words, environment(**slurm.variables)) as again:
            assert "[1/1 runs" in expect(again).stdout
        assert slurm.finish() == (0, ["started", "ended 0"])
    assert is_finished(records[0].parent) and (out / "report.html").exists()
