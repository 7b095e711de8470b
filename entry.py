"""How a command begins and ends: signals, standard streams, exit codes. It imports nothing that takes time.

A training run imports for seconds before it can do anything, and its libraries still have threads when it ends.
During all that time a command answers Ctrl-C and the signals of a cluster with one sentence and an exit code.
"""

import atexit
import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

EXIT_BAD_INPUT = 2  # a flag or a file is wrong; running again as it stands will not help
EXIT_NON_FINITE = 3  # the loss became infinite or not a number
EXIT_LOST_PEER = 4  # another process of the run died or fell silent; this one could not go on alone
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_PREEMPTED = 75  # stopped by SIGTERM or SIGUSR1; the same command with --auto_reload continues


def launcher_rank() -> str:
    """This process's rank as the launcher gave it, for messages."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def begin() -> None:
    """The first call of a command, before its imports; :func:`run` is the last.

    Signals are answered. The imports take less time: the garbage collector waits, which would look again and again
    through the million objects that torch and timm make and keep; and wandb, which timm imports for a function that is
    not used here, seems not to be installed.
    """
    _answer_signals()
    gc.disable()
    sys.modules.setdefault("wandb", None)  # importing it raises ImportError


def _answer_signals(importing: bool = True) -> None:
    """Ctrl-C ends the process with a sentence, SIGTERM and SIGUSR1 end it as a preemption.

    Args:
        importing: Whether Ctrl-C ends the process at once; otherwise the first one raises ``KeyboardInterrupt``.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell sets SIG_IGN for background jobs
        signal.signal(signal.SIGINT, _end_interrupted if importing else _interrupt)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end_preempted)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _end_interrupted)  # a second Ctrl-C ends the process at once
    raise KeyboardInterrupt


def _end_interrupted(number: int, frame: FrameType | None) -> None:
    _end("interrupted", EXIT_INTERRUPTED)


def _end_preempted(number: int, frame: FrameType | None) -> None:
    _end("stopped by a signal before training began; the same command begins again", EXIT_PREEMPTED)


def _end(sentence: str, code: int) -> NoReturn:
    try:  # not print(): the signal may have interrupted one
        os.write(2, f"[rank {launcher_rank()}] {sentence}\n".encode())
    finally:
        os._exit(code)


class Console:
    """A standard stream whose reader may leave (``| head -1``) or whose disk may fill up; the command goes on.

    Args:
        stream: Standard output or standard error.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Writes ``text``, or drops it once the stream has failed."""
        try:
            return self.stream.write(text)
        except OSError as error:
            return self._give_up(error) or len(text)

    def flush(self) -> None:
        """Flushes the stream, or gives it up if that fails."""
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failure = self.failure or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())  # this also takes what is in the buffer and what child processes write
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def explained(command: Callable[[], int | None], *errors: type[Exception]) -> int:
    """Runs a command; an error that its user can fix becomes one sentence and an exit code.

    Args:
        command: Returns its exit code; None: 0.
        *errors: Classes of such errors; their message is the sentence.
    """
    try:
        return command() or 0
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def user_path(text: str) -> Path:
    """A path from the command line; ``~`` is the user's home even where the shell keeps it (``--output=~/x``).

    Raises:
        ValueError: If the text has a null character.
    """
    if "\0" in text:
        raise ValueError("a path has no null character")
    return Path(text).expanduser()


def run(command: Callable[[], int | None]) -> NoReturn:
    """Runs a command and ends the process with its exit code.

    The interpreter is not shut down: torch threads that are still at work (a rendezvous that nobody joined) would abort
    the process with another exit code.

    Args:
        command: Returns its exit code; None: 0.
    """
    _answer_signals(importing=False)
    gc.freeze()  # what was imported stays: the collector never looks at it
    gc.enable()
    if "wandb" in sys.modules and sys.modules["wandb"] is None:
        del sys.modules["wandb"]
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:  # None where it was closed
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Console(stream))
    try:
        code = command() or 0
    except SystemExit as left:  # how argparse exits
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        print(f"[rank {launcher_rank()}] interrupted", file=sys.stderr)
    except BaseException:  # a bug of this repository
        code = 1
        traceback.print_exc()
    atexit._run_exitfuncs()  # ends loader processes, among others
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    failure = getattr(sys.stdout, "failure", None)
    if failure is not None and failure.errno != errno.EPIPE and code == 0:
        code = EXIT_BAD_INPUT
        print(f"error: standard output cannot be written ({failure.strerror}): free some space there", file=sys.stderr)
        sys.stderr.flush()
    os._exit(code)
