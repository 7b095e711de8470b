"""How a process begins and ends: signals before training, streams that nobody reads, exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, TINY, Run, environment, start_main, tiny_tree

import entry

HEAD = "import entry, os, signal, sys\n"


def python(code: str, stdout: int = subprocess.PIPE, **options: object) -> subprocess.CompletedProcess:
    """Runs a few lines that import nothing of torch."""
    words = [sys.executable, "-c", HEAD + code]
    return subprocess.run(words, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, **options)


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGINT, entry.EXIT_INTERRUPTED, "[rank 0] interrupted"),
        (signal.SIGTERM, entry.EXIT_PREEMPTED, "[rank 0] stopped by a signal before training began"),
        (signal.SIGUSR1, entry.EXIT_PREEMPTED, "[rank 0] stopped by a signal before training began"),
    ],
)
def test_a_signal_during_the_imports_ends_main_with_a_sentence(number: int, code: int, sentence: str) -> None:
    """The moment is found by what the process has loaded: Python's C library of numpy comes long before main() runs."""
    with start_main(*TINY, "--data-path", "/nowhere") as run:
        maps, deadline = Path(f"/proc/{run.process.pid}/maps"), time.monotonic() + 60
        while "numpy" not in maps.read_text():
            assert run.process.poll() is None and time.monotonic() < deadline, run.output
            time.sleep(0.005)
        os.kill(run.process.pid, number)
        done = run.finish(60)
    assert (done.returncode, done.stdout.count("\n")) == (code, 1) and done.stdout.startswith(sentence)


def test_a_signal_before_training_is_a_preemption() -> None:
    done = python("entry.run(lambda: os.kill(os.getpid(), signal.SIGUSR1))")
    assert done.returncode == entry.EXIT_PREEMPTED and done.stderr.count("\n") == 1


def test_the_second_interrupt_ends_at_once() -> None:
    """Also where the first one is being answered, and by a command that would not leave."""
    code = """
def command():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("too late")
entry.run(command)
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (entry.EXIT_INTERRUPTED, "", "[rank 0] interrupted\n")


def test_an_interrupt_that_the_shell_has_switched_off_stays_off() -> None:
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nentry.run(lambda: os.kill(os.getpid(), signal.SIGINT))"
    assert python(code).returncode == 0


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [("lambda: None", 0, ""), ("lambda: 3", 3, ""), ("lambda: sys.exit(2)", 2, ""), ("lambda: 1 // 0", 1, "Zero")],
)
def test_exit_codes_and_what_is_registered_for_the_end(command: str, code: int, error: str) -> None:
    done = python(f"import atexit\natexit.register(print, 'cleaned up')\nentry.run({command})")
    assert (done.returncode, done.stdout) == (code, "cleaned up\n") and error in done.stderr
    assert bool(done.stderr) == bool(error)


LINES = "entry.run(lambda: [print('x' * 100, flush=True) for _ in range(1000)] and 0)"


def test_a_reader_that_leaves_is_no_error() -> None:
    """As with ``| head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    done = python(LINES, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = python(LINES, stdout=full.fileno())
    assert done.returncode == entry.EXIT_BAD_INPUT
    assert done.stderr == "error: standard output cannot be written (No space left on device): free some space there\n"


def test_a_closed_standard_output_and_odd_characters_are_no_error() -> None:
    done = python("entry.run(lambda: print('\\ud800 \\u20ac') or 0)", env=environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stdout) == (0, "\\ud800 \\u20ac\n")
    words = ["sh", "-c", f"exec {sys.executable} -c 'import entry; entry.run(lambda: print(1) or 0)' >&-"]
    assert subprocess.run(words, cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.slow
def test_training_goes_on_without_its_reader(tmp_path: Path) -> None:
    """Every line of the log is lost from the second on, and nothing else."""
    data = tiny_tree(tmp_path / "data")
    flags = " ".join([*TINY, "--data-path", str(data), "--output_dir", str(tmp_path / "out")])
    line = f"{sys.executable} main.py {flags} 2>{tmp_path}/errors; echo code $? >{tmp_path}/code"
    with Run(["sh", "-c", f"({line}) | head -1"]) as run:
        run.finish(120)
    assert (tmp_path / "code").read_text() == "code 0\n"
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert (tmp_path / "out" / "log.txt").exists() and (tmp_path / "out" / "checkpoint.pth").exists()


@pytest.mark.slow
def test_a_lone_rank_leaves_with_its_own_exit_code(tmp_path: Path) -> None:
    """Torch's threads still wait for the other rank then; taking the interpreter down under them aborts (134)."""
    lone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    data = tiny_tree(tmp_path, train=4, val=3)
    with start_main(*TINY, "--data-path", data, "--dist-timeout", 1, env=environment(**lone)) as run:
        done = run.finish(60)
    assert done.returncode == entry.EXIT_BAD_INPUT, done.stdout
    assert "error: rank 1 of 2 could not join the process group" in done.stdout and "Traceback" not in done.stdout


def test_main_starts_without_packages_that_only_some_runs_need() -> None:
    names = "wandb", "tensorboard", "transformers", "pandas"
    program = f"import entry, sys; entry.begin(); import main; sys.exit(' '.join(filter(sys.modules.get, {names})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "\n"


def test_the_garbage_collector_waits_for_the_imports_and_leaves_them_alone() -> None:
    code = """
import gc
entry.begin()
waited, imported = not gc.isenabled(), []
entry.run(lambda: 7 if waited and gc.isenabled() and not any(o is imported for o in gc.get_objects()) else 1)
"""
    assert python(code).returncode == 7


@pytest.mark.parametrize("imported", [True, False])
def test_wandb_is_hidden_from_imports_unless_it_is_there_already(imported: bool, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("")
    code = f"""
sys.path.insert(0, {str(tmp_path)!r})
{"import wandb" if imported else ""}
entry.begin()
try:
    import wandb
    hidden = False
except ImportError:
    hidden = True
def command():
    import wandb
    return 7 if hidden else 8
entry.run(command)
"""
    assert python(code).returncode == (8 if imported else 7)
