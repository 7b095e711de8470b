"""Ranks that start at once: real processes, forked from a server that has imported the training code already.

Importing torch and timm takes 4 s of CPU a process, too much for a test that kills a run two dozen times. Each rank is
a process with a process group of its own, as under torchrun, and runs ``main.cli()`` as ``python main.py`` does.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest
from runs import ROOT, environment, free_port


def _run_rank(flags: Sequence[str], variables: dict[str, str], log: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    faulthandler.enable()  # SIGABRT shows where a rank hangs
    multiprocessing.set_start_method(None, force=True)  # loader processes start as in any run, not by this server
    sys.argv = ["main.py", *flags]
    import entry
    import main  # at once in the server's children; a test process does not need it

    entry.run(main.cli)


class Ranks:
    """The processes of one run; as a context, nothing of it outlives the context.

    Args:
        *flags: Flags of ``main.py``; paths and numbers may be given as such.
        folder: Where the ranks' outputs go.
        processes: Number of ranks.
        rank_flags: Further flags of single ranks, by rank.
        variables: Further environment variables.
    """

    def __init__(
        self,
        *flags: object,
        folder: Path,
        processes: int = 2,
        rank_flags: dict[int, Sequence[str]] | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["main"])
        with pytest.MonkeyPatch.context() as patch:  # the server's environment, where it is not running yet
            patch.setenv("PYTHONPATH", str(ROOT))
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()
        number = len(list(Path(folder).glob("attempt-*-rank-0.txt")))
        self.logs = [Path(folder) / f"attempt-{number}-rank-{rank}.txt" for rank in range(processes)]
        port = str(free_port())
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.touch()
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            words = [str(flag) for flag in (*flags, *(rank_flags or {}).get(rank, ()))]
            env = environment(**(group | (variables or {})))
            self.processes.append(context.Process(target=_run_rank, args=(words, env, str(log))))
            self.processes[-1].start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def output(self, rank: int | None = None) -> str:
        """What a rank, or all of them one after the other, have printed so far."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text(errors="replace") for log in logs)

    def running(self) -> bool:
        """Whether all ranks are alive."""
        return all(process.exitcode is None for process in self.processes)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60) -> bool:
        """Waits, looking every 2 ms, until ``condition()`` holds or a rank has ended; returns whether it holds.

        Raises:
            AssertionError: After ``timeout``, with the output.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running():
                return condition()
            assert time.monotonic() < deadline, f"waited {timeout} s in vain:\n{self.output()}"
            time.sleep(0.002)
        return True

    def wait_for(self, text: str, times: int = 1, rank: int = 0, timeout: float = 60) -> None:
        """Waits until a rank has printed ``text`` so many times; fails if a rank ends before."""
        found = self.wait_until(lambda: self.output(rank).count(text) >= times, timeout)
        assert found, f"{text!r} was not printed:\n{self.output()}"

    def signal(self, number: signal.Signals, rank: int) -> None:
        """Sends a signal to one rank's main process."""
        os.kill(self.processes[rank].pid, number)

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILLs the given ranks (all of them by default) with their loader processes, and waits for their end."""
        chosen = [self.processes[rank] for rank in (range(len(self.processes)) if ranks is None else ranks)]
        for process in chosen:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # ended, or not yet the leader of its group
                process.kill()
        for process in chosen:
            process.join()

    def finish(self, timeout: float = 120) -> list[int]:
        """Waits for the end and returns the exit codes by rank; negative ones are signals.

        Raises:
            AssertionError: After ``timeout``, with the output and the stacks of the ranks that are still running.
        """
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            hanging = [process for process in self.processes if process.exitcode is None]
            for process in hanging:  # all at once: the end of one may end the others
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGABRT)
            for process in hanging:
                process.join(5)
            self.kill()
            raise AssertionError(f"still running after {timeout} s, exit codes {codes}:\n{self.output()}")
        return codes

    def expect(self, *codes: int, timeout: float = 120) -> str:
        """Waits for the end, checks the exit codes (one for all, or one a rank) and returns the whole output."""
        found = self.finish(timeout)
        expected = list(codes) * len(found) if len(codes) == 1 else list(codes)
        assert found == expected, f"exit codes {found}, expected {expected}:\n{self.output()}"
        return self.output()
