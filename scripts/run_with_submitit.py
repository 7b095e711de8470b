"""Queues a run of ``main.py`` on Slurm through submitit, and requeues it after a time limit or preemption.

    python scripts/run_with_submitit.py --nodes 2 --ngpus 8 --timeout 1440 --partition gpu \
        --model attnscale_small_24 --batch-size 64 --data-set IMNET --data-path /data/imagenet --output_dir logs/run

Flags that are not in this script's --help are main.py's; they are checked before anything is queued. A run that trains
always gets --auto_reload, so that it continues after a requeue.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, so it runs from any folder

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import submitit
from submitit.core.utils import UncompletedJobError

from build import check_model_names
from entry import EXIT_BAD_INPUT, EXIT_PREEMPTED
from options import ArgumentError, check_args
from options import get_args_parser as get_run_parser
from oversmoothing.weights import ModelError
from preflight import check_flags
from readers.archives import DataError
from utils import SetupError

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 120  # Slurm's own end after a SIGTERM comes sooner (its KillWait is 30 s)


class Task:
    """One process of the job: runs ``main.py`` under the rank that submitit gives it.

    submitit's signal (SIGUSR2, before the time limit or at a preemption) and SIGTERM become a SIGTERM to ``main.py``,
    which saves and leaves with ``EXIT_PREEMPTED``. Only then, and only if submitit's signal came, does the job go back
    to the queue: SIGTERM alone is also what ``scancel`` sends, and a run that failed would fail again.

    The job's processes get this class by value, without this repository on their path: it uses none of its modules.

    Args:
        flags: Of ``main.py``.
        port: Port of the rendezvous without Slurm; with Slurm, ``main.py`` reads its variables.
    """

    def __init__(self, flags: list[str], port: int) -> None:
        self.flags = flags
        self.port = port
        self.child: subprocess.Popen | None = None
        self.requeue_asked = False

    def __call__(self) -> None:
        """Returns when the run has finished.

        Raises:
            UncompletedJobError: If ``main.py`` left with an error, or was stopped for good.
            SystemExit: If the job goes back to the queue.
        """
        job = submitit.JobEnvironment()
        preemption = getattr(signal, f"SIG{job.USR_SIG}")
        requeue = signal.getsignal(preemption)
        # main.py inherits the mask: some clusters signal every process of a job, and this signal would end main.py.
        signal.pthread_sigmask(signal.SIG_BLOCK, {preemption})
        command = [sys.executable, str(ROOT / "main.py"), *self.flags]
        self.child = subprocess.Popen(command, env=os.environ | self._group(job))
        for number in (signal.SIGTERM, signal.SIGUSR1, preemption):
            signal.signal(number, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {preemption})
        try:
            code = self.child.wait()
        finally:
            if self.child.returncode is None:  # Ctrl-C
                self.child.kill()
        stopped = code in (EXIT_PREEMPTED, -signal.SIGTERM)  # the latter if it had not begun to train
        deadline = time.monotonic() + PATIENCE_S
        while stopped and not self.requeue_asked and time.monotonic() < deadline:
            time.sleep(0.1)
        if stopped and self.requeue_asked:
            if job.global_rank == 0:
                signal.signal(preemption, requeue)
                signal.raise_signal(preemption)  # submitit calls `checkpoint`, queues the job again and exits
            sys.exit(0)  # an error code here might end rank 0 before it has requeued the job
        if code:
            reason = "it was stopped, not preempted" if stopped else "its error is in the lines above"
            raise submitit.core.utils.UncompletedJobError(
                f"main.py of rank {job.global_rank} left with exit code {code} and is not queued again: {reason}"
            )

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues after a preemption: the same task, which finds its checkpoint by --auto_reload."""
        return submitit.helpers.DelayedSubmission(Task(self.flags, self.port))

    def _group(self, job: submitit.JobEnvironment) -> dict[str, str]:
        if job.cluster == "slurm":
            return {}
        ranks = {"RANK": job.global_rank, "LOCAL_RANK": job.local_rank, "WORLD_SIZE": job.num_tasks}
        ranks |= {"LOCAL_WORLD_SIZE": job.num_tasks}  # one node; they share its cores
        group = ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        return {name: str(value) for name, value in group.items()}

    def _stop(self, number: int, frame: object) -> None:
        if number not in (signal.SIGTERM, signal.SIGUSR1):
            self.requeue_asked = True
        if self.child.returncode is None:
            os.kill(self.child.pid, signal.SIGTERM)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the job; those of the run are ``main.py``'s."""
    parser = argparse.ArgumentParser(
        description="Queue a run of main.py on Slurm. All other flags are main.py's (python main.py --help).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", default=1, type=int, metavar="N", help="machines")
    add("--ngpus", default=8, type=int, metavar="N", help="GPUs of each machine; 0: train on CPU")
    add(
        "--tasks_per_node", "--tasks-per-node", default=None, type=int, metavar="N",
        help="processes on each machine; left out: one a GPU",
    )  # fmt: skip
    add("--cpus_per_task", "--cpus-per-task", default=10, type=int, metavar="N", help="cores of each process")
    add("--timeout", default=2800, type=int, metavar="MINUTES", help="time limit; the job then goes back to the queue")
    add(
        "--max_timeouts", "--max-timeouts", default=100, type=int, metavar="N",
        help="how many time limits it may reach before it is over; preemptions do not count",
    )  # fmt: skip
    add(
        "--signal_delay", "--signal-delay", default=120, type=int, metavar="SECONDS",
        help="from the warning to the end: has to last for one step and one save (Slurm only)",
    )  # fmt: skip
    add(
        "--job_dir", "--job-dir", default=None, type=Path, metavar="DIR",
        help="submitit's files and the logs of the processes, on storage that all machines share; left out: "
        "OUTPUT_DIR/submitit",
    )  # fmt: skip
    add("--executor", default="auto", choices=["auto", "slurm", "local", "debug"], help="auto: Slurm if srun is here")
    for flag in ("partition", "account", "qos", "constraint", "mem", "comment"):
        add(f"--{flag}", default=None, metavar="X", help=f"sbatch's --{flag}")
    return parser


def make_executor(job: argparse.Namespace, run: argparse.Namespace) -> submitit.AutoExecutor:
    """The executor of ``--executor``, with the job's demands.

    Raises:
        SetupError: If it is not available, or cannot meet them.
    """
    cluster = job.executor
    if cluster == "auto":
        cluster = "slurm" if shutil.which("srun") else "local"
    folder = job.job_dir or Path(run.output_dir, "submitit")
    try:
        limit = {f"{name}_max_num_timeout": job.max_timeouts for name in ("slurm", "local")}
        executor = submitit.AutoExecutor(folder, cluster=cluster, **(limit if cluster != "debug" else {}))
        asked = {name: getattr(job, name) for name in ("partition", "account", "qos", "constraint", "mem", "comment")}
        executor.update_parameters(
            name=run.model,
            nodes=job.nodes,
            gpus_per_node=job.ngpus or None,
            tasks_per_node=job.tasks_per_node or max(job.ngpus, 1),
            cpus_per_task=job.cpus_per_task,
            timeout_min=job.timeout,
            stderr_to_stdout=True,
            slurm_signal_delay_s=job.signal_delay,
            slurm_additional_parameters={"requeue": True},
            # The first process to leave after a preemption must not end the others, and the job must not wait for them
            # forever. Since Slurm 22.05, srun does not inherit the cores of a process from sbatch.
            slurm_srun_args=["--kill-on-bad-exit=0", "--wait=300", f"--cpus-per-task={job.cpus_per_task}"],
            **{f"slurm_{name}": value for name, value in asked.items()},
        )
    except (RuntimeError, ValueError) as error:  # no srun; the local executor has one node
        raise SetupError(f"--executor {job.executor}: {error}") from error
    return executor


def check(job: argparse.Namespace, run: argparse.Namespace) -> None:
    """Refuses flags that would fail only after the job was queued.

    Raises:
        ArgumentError: If a flag is missing or wrong; further errors as ``check_model_names`` and ``check_flags``.
    """
    check_args(run)
    check_model_names(run)
    check_flags(run)
    for flag in ("nodes", "timeout", "cpus_per_task"):
        if getattr(job, flag) < 1:
            raise ArgumentError(f"--{flag} {getattr(job, flag)}: give a whole number of 1 or more")
    if not run.output_dir and not (run.eval or run.throughput):
        raise ArgumentError("--output_dir is missing: a run that goes back to the queue needs its checkpoints")
    if not run.output_dir and job.job_dir is None:
        raise ArgumentError("--job_dir is missing: without --output_dir it is the only place for the logs")


REFUSALS = (ArgumentError, DataError, ModelError, SetupError, OSError, UncompletedJobError)


def submit(words: list[str] | None = None) -> tuple[submitit.Job, str]:
    """Queues the job of this script's flags and ``main.py``'s; returns it and the kind of its executor.

    Raises:
        ArgumentError: If a flag is missing or wrong. Other errors raised here are in ``REFUSALS``, too.
    """
    job, flags = get_args_parser().parse_known_args(words)
    run = get_run_parser().parse_args(flags)
    check(job, run)
    executor = make_executor(job, run)
    if not (run.eval or run.throughput or run.auto_reload):
        flags.append("--auto_reload")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return executor.submit(Task(flags, port)), executor.cluster


def main(words: list[str] | None = None) -> int:
    """Queues the job; waits for its end where there is no queue."""
    try:
        submitted, cluster = submit(words)
    except REFUSALS as error:
        print(f"error: {str(error).strip()}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"job {submitted.job_id} ({cluster}), log of rank 0: {submitted.paths.stdout}", flush=True)
    if cluster == "slurm":
        return 0
    failure = submitted.exception()  # after its end
    if failure is not None:
        print(f"error: {str(failure).rpartition('UncompletedJobError: ')[2].splitlines()[0]}", file=sys.stderr)
    return int(failure is not None)


if __name__ == "__main__":
    entry.run(main)
