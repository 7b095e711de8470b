"""Where a run of a study is made: on this machine, or in the queue of a cluster."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from scripts.comparison.flags import StudyError
from scripts.comparison.records import read_record, write_record
from scripts.comparison.study import Run

ROOT = Path(__file__).resolve().parents[2]


class Job(Protocol):
    """A run that is being made."""

    def poll(self) -> int | None:
        """Its exit code; None while it goes on."""

    def stop(self) -> None:
        """Asks it to save and leave; returns at once."""

    def wait(self, timeout_s: float) -> None:
        """Waits until it has left; ends it after ``timeout_s``."""


class Launcher(Protocol):
    """Something that makes runs."""

    places: int  # how many at a time

    def start(self, run: Run, folder: Path, words: list[str], place: int) -> Job:
        """Begins a run.

        Args:
            run: The run to make.
            folder: The run's folder.
            words: Flags of ``main.py``.
            place: From 0 to ``places`` - 1; no other run has it at the same time.
        """


# ---- on this machine -------------------------------------------------------------------------------------------------
@dataclass
class Local:
    """Runs on this machine, through the published launch command.

    Attributes:
        processes: Processes of each run.
        places: Runs at a time.
        threads: Threads of each process.
        gpus: GPUs of this machine; runs share none if there are enough.
    """

    processes: int
    places: int
    threads: int = 1
    gpus: int = field(default_factory=torch.cuda.device_count)

    def start(self, run: Run, folder: Path, words: list[str], place: int) -> Job:
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            devices = [str((place * self.processes + i) % self.gpus) for i in range(min(self.processes, self.gpus))]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        with (folder / "console.txt").open("a") as console:
            # In its own session: Ctrl-C reaches compare.py alone, which sends runs the signal on which they save.
            return LocalJob(
                subprocess.Popen(
                    [*ends_with_us(), *launch_words(self.processes), *words], env=env, stdout=console,
                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                )
            )  # fmt: skip


@dataclass
class LocalJob:
    """The launcher's process."""

    process: subprocess.Popen

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        self.process.terminate()

    def wait(self, timeout_s: float) -> None:
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def launch_words(processes: int) -> list[str]:
    """The published launch command up to ``main.py``, with a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-W", "ignore::FutureWarning", "-m", "torch.distributed.launch", f"--nproc_per_node={processes}"]
    return [sys.executable, *launcher, f"--master_port={port}", "--use_env", here("main.py")]


def here(script: str) -> str:
    """A file of this repository by its name from the current folder; other names are left as they are."""
    inside = Path.cwd() == ROOT or not (ROOT / script).is_file()
    return script if inside else str(ROOT / script)


def ends_with_us() -> list[str]:
    """Words before a command that send it SIGTERM whenever this process dies; none if the system has no such way."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv and sys.platform == "linux" else []


# ---- in a queue ------------------------------------------------------------------------------------------------------
@dataclass
class Queue:
    """Runs as jobs of submitit, as ``run_with_submitit.py`` queues them: they come back after a preemption.

    Attributes:
        flags: Flags of ``run_with_submitit.py``.
        places: Jobs in the queue at a time.
    """

    flags: list[str]
    places: int = 64

    def start(self, run: Run, folder: Path, words: list[str], place: int) -> Job:
        from scripts import run_with_submitit  # submitit is optional

        record = read_record(folder)
        if (earlier := QueuedJob.again(folder, record)) is not None:
            return earlier
        try:
            job, _ = run_with_submitit.submit([*self.flags, "--job_dir", str(folder / "submitit"), *words])
        except run_with_submitit.REFUSALS as error:
            raise StudyError(f"--submitit {shlex.join(self.flags)}: {error}") from error
        write_record(folder, record | {"job": job.job_id})
        return QueuedJob(job)


@dataclass
class QueuedJob:
    """A job of submitit."""

    job: Any

    @classmethod
    def again(cls, folder: Path, record: dict) -> "QueuedJob | None":
        """The job that an earlier ``compare.py`` has queued, if it is still there."""
        import submitit

        if "job" not in record or shutil.which("sacct") is None:
            return None
        job = submitit.SlurmJob(folder=folder / "submitit", job_id=record["job"])
        return None if job.done(force_check=True) else cls(job)

    def poll(self) -> int | None:
        return int(self.job.exception() is not None) if self.job.done() else None

    def stop(self) -> None:
        """Ends a job on this machine; Slurm's jobs stay queued, and the next ``compare.py`` finds them."""
        import submitit

        if isinstance(self.job, submitit.LocalJob):
            self.job.cancel()

    def wait(self, timeout_s: float) -> None:
        """Does not wait: a job saves by itself."""
