"""Runs through submitit: what is refused before the queue, preemption and return, errors that must not come back."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import Ranks
from runs import Run, children, environment, expect, tiny_tree
from slurm import Slurm
from test_resume import assert_same_results

import options
from scripts import run_with_submitit

EPOCHS = 8
RECIPE = (  # four steps an epoch for two processes
    *("--model", "attnscale_small_12", "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"),
    *("--input-size", "32", "--data-set", "FOLDER", "--batch-size", "8", "--epochs", str(EPOCHS), "--device", "cpu"),
    *("--lr", "0.05", "--warmup-epochs", "0", "--model-ema-decay", "0.9", "--print-freq", "1", "--num_workers", "1"),
)


def test_the_job_s_flags_are_none_of_main_s() -> None:
    """Or one of the two would never get its value."""

    def spellings(parser) -> set[str]:
        return {spelling for action in parser._actions for spelling in action.option_strings} - {"-h", "--help"}

    assert not spellings(run_with_submitit.get_args_parser()) & spellings(options.get_args_parser())


@pytest.mark.parametrize(("flags", "said"), [
    (["--modle", "x", "--output_dir", "out"], "unrecognized arguments: --modle"),
    (["--batch-size", "many", "--output_dir", "out"], "argument --batch-size"),
    (["--batch-size", "7", "--output_dir", "out"], "error: --batch-size 7 is odd"),
    (["--model", "attnscale_smal_12", "--output_dir", "out"], "error: --model attnscale_smal_12: no such model"),
    (["--epochs", "3"], "error: --output_dir is missing"),
    (["--eval", "--resume", "x.pth"], "error: --job_dir is missing"),
    (["--nodes", "0", "--output_dir", "out"], "error: --nodes 0: give a whole number of 1 or more"),
    (["--nodes", "2", "--output_dir", "out"], "error: --executor local: LocalExecutor can use only one node"),
    (["--executor", "slurm", "--output_dir", "out"], 'error: --executor slurm: Could not detect "srun"'),
])  # fmt: skip
def test_bad_flags_fail_before_the_queue(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    try:
        code = run_with_submitit.main(["--executor", "local", *flags])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.pkl"))


def test_tasks_on_one_machine_share_its_cores() -> None:
    job = SimpleNamespace(cluster="local", global_rank=1, local_rank=1, num_tasks=2)
    group = run_with_submitit.Task(["--epochs", "1"], 1234)._group(job)
    assert (group["RANK"], group["WORLD_SIZE"], group["LOCAL_WORLD_SIZE"]) == ("1", "2", "2")


@pytest.mark.slow
def test_a_preempted_job_goes_back_to_the_queue_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    """submitit's executor of one machine, two tasks; they get what Slurm's preemption sends: SIGTERM, then SIGUSR2."""
    flags = [*RECIPE, "--data-path", str(tiny_tree(tmp_path / "data", train=64, val=14))]
    (undisturbed := tmp_path / "undisturbed").mkdir()
    with Ranks(*flags, "--output_dir", undisturbed, folder=undisturbed) as run:
        run.expect(0)
    words = [sys.executable, "scripts/run_with_submitit.py", "--executor", "local", "--ngpus", "0"]
    words += ["--tasks-per-node", "2", *flags, "--output_dir", str(tmp_path / "out")]
    with Run(words, environment()) as run:
        log = Path(run.wait_for("_log.out").split("log of rank 0: ")[1].split("\n")[0])
        while "Epoch: [1]  [1/4]" not in (log.read_text() if log.exists() else ""):
            assert run.process.poll() is None, run.output
            time.sleep(0.05)
        tasks = children(run.workers()[0])
        for number in (signal.SIGTERM, signal.SIGUSR2):
            for task in tasks:
                os.kill(task, number)
        expect(run)
    text = log.read_text()
    assert text.count("stopped by a signal after epoch") == 1  # rank 0's; the other has a log of its own
    assert text.count("Requeued job") == 1 and text.count("auto-reload: continuing from") == 1
    assert text.count("Job completed successfully") == 1
    assert_same_results(tmp_path / "out", undisturbed, epochs=EPOCHS)


@pytest.mark.slow
def test_a_failed_run_is_not_queued_again(tmp_path: Path) -> None:
    """Through submitit's batch file, under the emulated Slurm; the folder of images is absent where the job runs."""
    with Slurm(tmp_path / "slurm") as slurm:
        words = [sys.executable, "scripts/run_with_submitit.py", "--ngpus", "0", "--mem", "2G", *RECIPE]
        words += ["--data-path", tmp_path / "absent", "--output_dir", tmp_path / "out"]
        with Run([*map(str, words)], environment(**slurm.variables)) as run:
            log = Path(expect(run).stdout.split("log of rank 0: ")[1].split("\n")[0])
        code, events = slurm.finish()
    assert code == 1 and events == ["started", "ended 1"], log.read_text()
    assert f"error: --data-path {tmp_path / 'absent'} does not exist" in log.read_text()
    assert "main.py of rank 0 left with exit code 2 and is not queued again" in log.read_text()
