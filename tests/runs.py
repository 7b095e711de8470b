"""Shared by the tests that start ``main.py`` as its users do: launchers, free ports, and a small tree of images."""

import contextlib
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import main

ROOT = Path(__file__).resolve().parent.parent
# A model of 30,000 parameters and loading without worker processes; --data-path and what a test is about come after it.
TINY = (
    *("--model", "attnscale_small_12", "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"),
    *("--input-size", "32", "--data-set", "FOLDER", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0"),
    *("--num_workers", "0", "--device", "cpu"),
)
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a run: CPU only, one thread, no launcher's or Slurm's variables but those given."""
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("SLURM_")}
    return inherited | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | variables


def command(launcher: str, processes: int = 1) -> list[str]:
    """The words before ``main.py``'s flags, by the name of the launcher.

    Args:
        launcher: "plain" (``python main.py``), "torchrun", "launch" (``torch.distributed.launch --use_env``) or
            "launch_without_use_env".
        processes: Processes that the launcher starts.

    Raises:
        ValueError: If the launcher is unknown.
    """
    if launcher == "plain":
        return [sys.executable, "main.py"]
    if launcher == "torchrun":
        flags = ["torch.distributed.run", "--standalone"]
    elif launcher in ("launch", "launch_without_use_env"):
        flags = ["torch.distributed.launch", f"--master_port={free_port()}"]
        flags += ["--use_env"] if launcher == "launch" else []
    else:
        raise ValueError(f"unknown launcher {launcher!r}: plain, torchrun, launch or launch_without_use_env")
    return [sys.executable, "-m", *flags, f"--nproc_per_node={processes}", "main.py"]


class Run:
    """A started command whose output can be read while it runs; as a context, nothing of it outlives the context.

    Args:
        words: The command.
        env: Its whole environment; None: that of `environment`.
        cwd: Its working folder.
    """

    def __init__(self, words: list[str], env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
        self.file = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.process = subprocess.Popen(
            words, cwd=cwd, env=environment() if env is None else env, stdout=self.file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def output(self) -> str:
        """What it has printed so far, standard error included."""
        return Path(self.file.name).read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 60) -> str:
        """Waits until the output holds ``text`` and returns the output so far; fails if the command ends before."""
        deadline = time.monotonic() + timeout
        while text not in (output := self.output):
            ended = self.process.poll() is not None
            if (ended and text not in self.output) or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"{text!r} was not printed (ended: {ended}):\n{output}")
            time.sleep(0.05)
        return output

    def workers(self) -> list[int]:
        """Process ids of its children, in the order in which they were started: the ranks, under a launcher."""
        return children(self.process.pid)

    def finish(self, timeout: float = 120) -> subprocess.CompletedProcess:
        """Waits for the end and returns the exit code with the merged output; after ``timeout`` s everything is ended.

        Raises:
            AssertionError: After ``timeout``, with the output.
        """
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired as late:
            self.stop()
            raise AssertionError(f"still running after {timeout} s: {' '.join(late.cmd)}\n{late.output}") from late
        finally:
            output = self.output
        return subprocess.CompletedProcess(self.process.args, code, output)

    def stop(self) -> None:
        """Ends the command and everything that it started."""
        pids = [self.process.pid]
        for pid in pids:  # grows while it is walked: children of children
            pids += children(pid)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


def children(pid: int) -> list[int]:
    """Process ids of the children of ``pid``, oldest first; empty once it has ended. Reads Linux's ``/proc``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()  # state, parent, ...
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        if int(after_name[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def start_main(*flags: str, processes: int = 1, launcher: str | None = None, env: dict[str, str] | None = None) -> Run:
    """Starts ``main.py`` and returns at once.

    Args:
        *flags: Flags of ``main.py``; paths may be given as such.
        processes: Processes to start.
        launcher: See `command`; left out: "plain" for one process, else "torchrun".
        env: The whole environment; None: that of `environment`.
    """
    launcher = launcher or ("plain" if processes == 1 else "torchrun")
    return Run([*command(launcher, processes), *map(str, flags)], env)


def run_main(
    *flags: str,
    processes: int = 1,
    launcher: str | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 120,
    code: int | None = 0,
) -> subprocess.CompletedProcess:
    """Runs ``main.py`` to its end; arguments as `start_main`.

    Args:
        timeout: Seconds after which the run is ended and the test fails.
        code: The exit code it must have; None: any. A launcher turns every failure of a process into 1.

    Returns:
        ``returncode`` and, as ``stdout``, the merged output.
    """
    with start_main(*flags, processes=processes, launcher=launcher, env=env) as run:
        return expect(run, timeout=timeout, code=code)


def expect(run: Run, *, timeout: float = 120, code: int | None = 0) -> subprocess.CompletedProcess:
    """Waits for the end of ``run`` and checks its exit code; the output is in the message."""
    done = run.finish(timeout)
    if code is not None and done.returncode != code:
        raise AssertionError(f"exit code {done.returncode}, expected {code}: {' '.join(done.args)}\n{done.stdout}")
    return done


def tiny_tree(folder: Path, *, classes: int = 3, train: int = 16, val: int = 7, seed: int = 0) -> Path:
    """Writes a small ImageFolder tree of real files: JPEGs of several sizes, one of them grey-scale, one CMYK, one PNG.

    Args:
        folder: Where ``train/<class>/`` and ``val/<class>/`` go; made if needed.
        classes: Number of classes; classes differ in colour, so they can be learned.
        train: Training images, dealt out to the classes in turn.
        val: Validation images, likewise.
        seed: Of the pixels.

    Returns:
        ``folder``.
    """
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(0).integers(0, 256, (classes, 3))  # the same for every seed
    modes = {1: "L", 2: "CMYK", 3: "P"}
    sizes = [(40, 40), (64, 48), (33, 71), (90, 60)]
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            path = Path(folder) / split / f"class_{number % classes}" / f"{number:04d}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            width, height = sizes[number % len(sizes)]
            pixels = (colours[number % classes] + rng.integers(0, 256, (height, width, 3))) // 2
            mode = modes.get(number, "RGB")
            image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
            image.save(path.with_suffix(".png") if mode == "P" else path)
    return Path(folder)


def call_main(*flags: str, code: int | None = 0) -> subprocess.CompletedProcess:
    """Runs ``main.py``'s command line inside this process: as real as `run_main` for one process, without its start.

    Args:
        *flags: Flags of ``main.py``; paths may be given as such.
        code: The exit code it must have; None: any.

    Returns:
        ``returncode``, and ``stdout`` and ``stderr`` apart.
    """
    root, argv = logging.getLogger(), sys.argv
    handlers, level = root.handlers[:], root.level
    on_signal = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    printed, errors = io.StringIO(), io.StringIO()
    sys.argv = ["main.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            exit_code = main.cli()
    except SystemExit as left:  # argparse's way out
        exit_code = left.code
    finally:
        sys.argv = argv
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(level)
        for number, handler in on_signal.items():
            signal.signal(number, handler)
    done = subprocess.CompletedProcess(["main.py", *map(str, flags)], exit_code, printed.getvalue(), errors.getvalue())
    if code is not None and exit_code != code:
        raise AssertionError(f"exit code {exit_code}, expected {code}: {done.args}\n{done.stdout}\n{done.stderr}")
    return done
