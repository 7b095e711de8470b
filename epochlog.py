"""``log.txt``: one JSON object an epoch; written by a run, read by everything that shows or compares runs.

Nothing here imports torch, which takes seconds: ``scripts/plot_log.py`` starts at once.
"""

import codecs
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

_logger = logging.getLogger(__name__)

OTHER_LINES = "log-other-lines.txt"  # beside log.txt: lines from it that are not epochs
# What is drawn and compared. A line may lack some; those it has are numbers.
QUANTITIES = ("train_loss", "train_lr", "test_loss", "test_acc1", "test_ema_loss", "test_ema_acc1")


class LogError(ValueError):
    """A log that cannot be used; the message names the file, the fault and the way out."""


class EpochLog:
    """``log.txt`` of a run, each epoch exactly once.

    A line is on disk before the checkpoint of its epoch. So wherever a run was killed, all lines before its resume
    point are there. Lines from that point on are dropped here and written again.
    """

    def __init__(self, path: Path, start_epoch: int) -> None:
        self.path = path
        lines, others = _sort(path.read_bytes()) if path.exists() else ([], [])
        if others:
            self._set_aside(others)
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["epoch"] < start_epoch)
        temporary = path.with_suffix(".tmp")
        _write(temporary, "w", kept)
        os.replace(temporary, path)

    def _set_aside(self, lines: list[bytes]) -> None:
        target = self.path.with_name(OTHER_LINES)
        _write(target, "ab", b"".join(line + b"\n" for line in lines))
        _logger.warning(
            f"{self.path}: {len(lines)} of its lines are no epochs, or of epochs that come again: moved to "
            f"{target.name} beside it"
        )

    def append(self, line: dict) -> None:
        """Writes one epoch's line and waits until it is on disk."""
        _write(self.path, "a", json.dumps(line) + "\n")

    @staticmethod
    def read(path: Path) -> list[dict]:
        """The epochs of a ``log.txt`` in order; anything else in it is left out. See :func:`read_log`."""
        return _sort(path.read_bytes())[0]


def read_log(source: Path) -> list[dict[str, float]]:
    """Reads a run's epochs in order, for programs that show them; a line that is not an epoch is an error.

    Args:
        source: The run's ``log.txt``, or the folder that holds it.

    Returns:
        One dict an epoch. If an epoch occurs twice, the later line counts. A last line cut short is left out, and so
        are values that are not finite.

    Raises:
        LogError: If the file is missing or cannot be read, has a line that is not an epoch, or has no epoch.
    """
    path = source / "log.txt" if source.is_dir() else source
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        way_out = "give a run's --output_dir, which gets its log.txt at the end of the first epoch"
        raise LogError(f"{path}: no such file: {way_out}") from error
    except OSError as error:
        raise LogError(f"{path}: cannot be read ({error}): give a run's log.txt") from error
    epochs = {}
    for number, text, line in _parse(content):
        if line is None or not all(type(line.get(name)) in (int, float, NoneType) for name in QUANTITIES):
            shown = text[:40].decode("utf-8", "backslashreplace")
            raise LogError(
                f"{path}: line {number} is not an epoch of a log.txt ({shown!r}): give the one that main.py wrote"
            )
        epochs[line["epoch"]] = {k: v for k, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
    if not epochs:
        raise LogError(f"{path}: holds no epoch yet: wait for the first one to end")
    return [epochs[epoch] for epoch in sorted(epochs)]


def _sort(content: bytes) -> tuple[list[dict], list[bytes]]:
    """The epochs in order, and all other lines, such as people and other programs add.

    If an epoch occurs twice, the later line counts and the earlier one is among the others.
    """
    epochs: dict[int, tuple[dict, bytes]] = {}
    others = []
    for _, text, line in _parse(content):
        if line is None:
            others.append(text)
            continue
        if line["epoch"] in epochs:
            others.append(epochs[line["epoch"]][1])
        epochs[line["epoch"]] = line, text
    return [epochs[epoch][0] for epoch in sorted(epochs)], others


def _parse(content: bytes) -> Iterator[tuple[int, bytes, dict | None]]:
    """Number (from 1), text and epoch (or None) of each line; empty ones and a last one cut short are left out."""
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or type(line.get("epoch")) is not int or not 0 <= line["epoch"] < 2**31:
            line = None
        if line is not None or number < len(lines):
            yield number, text, line


def _write(path: Path, mode: str, content: str | bytes) -> None:
    """Writes and waits until it is on disk."""
    with path.open(mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
