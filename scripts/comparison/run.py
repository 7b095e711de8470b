"""Makes the runs of a study: several at a time, each once; a stopped run is continued."""

import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

import entry
import utils
from scripts.comparison.flags import StudyError
from scripts.comparison.launch import Job, Launcher, here
from scripts.comparison.records import epochs_done, find_folder, is_finished, read_record, write_record
from scripts.comparison.study import Run, Study

POLL_S = 0.2
PATIENCE_S = 60  # from the signal to the end of a run that is saving


class Stopped(Exception):
    """A signal asked to stop; the runs have saved and left.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
        self.code = entry.EXIT_INTERRUPTED if number == signal.SIGINT else entry.EXIT_PREEMPTED


# ---- all runs --------------------------------------------------------------------------------------------------------
class Progress:
    """One line: runs and epochs done, and an estimate of the time left, from the epochs made since the start."""

    def __init__(self, total_runs: int, total_epochs: int, done_epochs: int) -> None:
        self.total_runs, self.runs, self.failed = total_runs, 0, 0
        self.began = time.monotonic()
        self.first = done_epochs
        self.bar = tqdm(total=total_epochs, initial=done_epochs, unit="epoch", disable=None, smoothing=0)

    def update(self, epochs: int) -> None:
        """Updates the line with the number of epochs in all logs."""
        self.bar.total = max(self.bar.total, epochs)
        self.bar.update(epochs - self.bar.n)
        self.bar.n = epochs  # a disabled bar does not count

    def line(self, text: str) -> None:
        """Prints a line about an event, with the estimate."""
        made, left = self.bar.n - self.first, self.bar.total - self.bar.n
        seconds = (time.monotonic() - self.began) / made * left if made else None
        estimate = f"about {timedelta(seconds=int(seconds))} left" if seconds is not None else "time left not known yet"
        state = f"{self.runs}/{self.total_runs} runs, {100 * self.bar.n / max(self.bar.total, 1):.0f}% of the epochs"
        self.bar.write(f"{text}  [{state}, {estimate}]", file=sys.stdout)
        sys.stdout.flush()


def prepare(study: Study) -> None:
    """Runs the study's own commands, such as one that writes its data set.

    Raises:
        StudyError: If one fails.
    """
    for command in study.prepare:
        script, *words = shlex.split(command)
        done = subprocess.run([sys.executable, here(script), *words])
        if done.returncode:
            raise StudyError(f"{study.source}, prepare = {command!r}: it left with exit code {done.returncode}")


def make_runs(runs: list[Run], folder: Path, launcher: Launcher) -> list[Run]:
    """Makes all runs that are not there yet.

    Args:
        runs: Runs of the study; equal ones (arms that are the same) are made once.
        folder: Holds a folder for each.
        launcher: Makes them.

    Returns:
        Runs that failed, and runs that could not begin because the run they start from failed.

    Raises:
        Stopped: After SIGTERM or Ctrl-C, when the runs have saved and left.
        StudyError: If a run cannot be queued.
    """
    different = list({run.identity: run for run in runs}.values())
    folders = {run.identity: find_folder(folder, run) for run in different}
    waiting = [run for run in different if not is_finished(folders[run.identity])]
    finished = {run.identity for run in different} - {run.identity for run in waiting}
    total = sum(run.epochs for run in different)
    progress = Progress(len(different), total, sum(epochs_done(path) for path in folders.values()))
    progress.runs = len(finished)
    failed: list[Run] = []
    jobs: dict[int, tuple[Run, Job]] = {}  # by place
    if finished:
        progress.line(f"{len(finished)} runs are there already")
    with _stopping(lambda: [job for _, job in jobs.values()]) as check:
        while waiting or jobs:
            check()
            lost = {run.identity for run in failed}
            for run in [run for run in waiting if run.after is not None and run.after.identity in lost]:
                waiting.remove(run)
                failed.append(run)
            for place in range(launcher.places):
                ready = (run for run in waiting if run.after is None or run.after.identity in finished)
                if place not in jobs and (run := next(ready, None)) is not None:
                    waiting.remove(run)
                    jobs[place] = run, _start(run, folders, launcher, place)
            time.sleep(POLL_S)
            for place, (run, job) in list(jobs.items()):
                if (code := job.poll()) is None:
                    continue
                del jobs[place]
                good = _finish(run, folders[run.identity], code)
                finished |= {run.identity} if good else set()
                failed += [] if good else [run]
                progress.update(sum(epochs_done(path) for path in folders.values()))
                progress.runs = len(finished)
                where = folders[run.identity]
                console = where / "console.txt"
                failure = f"FAILED, exit code {code}{_reason(console)}, see {console}"
                progress.line(f"{where.name}: " + ("done" if good else failure))
            progress.update(sum(epochs_done(path) for path in folders.values()))
    progress.bar.close()
    return failed


def _start(run: Run, folders: dict[str, Path], launcher: Launcher, place: int) -> Job:
    folder = folders[run.identity]
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folders[run.after.identity] / "checkpoint.pth" if run.after is not None else None
    words = run.words(folder, checkpoint)
    record = read_record(folder)
    record.setdefault("revisions", [])
    if (revision := utils.git_revision()) not in record["revisions"]:
        record["revisions"].append(revision)
    record |= {
        "arm": run.arm, "setting": run.setting, "seed": run.seed, "processes": run.processes,
        "command": shlex.join(["main.py", *words]), "host": platform.node(), "torch": torch.__version__,
        "began": time.time(), "seconds": record.get("seconds", 0.0),
    }  # fmt: skip
    write_record(folder, record)
    return launcher.start(run, folder, words, place)


def _finish(run: Run, folder: Path, code: int) -> bool:
    """Records how a run ended; returns whether it is complete."""
    record = read_record(folder)
    record["seconds"] += time.time() - record.pop("began", time.time())
    record.pop("job", None)
    complete = code == 0 and epochs_done(folder) == run.epochs
    write_record(folder, record | ({"finished": True} if complete else {"exit_code": code}))
    return complete


def _reason(console: Path) -> str:
    """The sentence with which a failed run ended, behind a comma; empty if there is none."""
    try:
        lines = console.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((f", {line}" for line in reversed(lines) if re.match(r"(\[rank \d+\] )?error: ", line)), "")


@contextmanager
def _stopping(jobs: Callable[[], list[Job]]) -> Iterator[Callable[[], None]]:
    """Within the context SIGTERM and Ctrl-C let the jobs save and leave; yields a function that raises after a signal.

    However the context is left, no job goes on.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)

    def check() -> None:
        if received:
            raise Stopped(received[0])

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        left = jobs()
        for job in left:
            job.stop()
        deadline = time.monotonic() + PATIENCE_S
        for job in left:
            job.wait(max(0.1, deadline - time.monotonic()))
        for number, handler in before.items():
            signal.signal(number, handler)
