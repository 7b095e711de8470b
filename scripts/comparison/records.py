"""The state of a run on disk: its folder, its ``run.json``, how far it is.

A run's folder holds what ``main.py`` writes, ``run.json`` (its command and where it was made) and ``console.txt``.
``run.json`` says ``finished`` once ``main.py`` has left without an error and the log has all epochs.
"""

import json
import os
from pathlib import Path
from typing import Any

from epochlog import EpochLog
from scripts.comparison.study import Run


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json``; empty where there is none."""
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes ``run.json``, whole or not at all."""
    temporary = folder / "run.json.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, folder / "run.json")


def epochs_done(folder: Path) -> int:
    """Epochs in a run's log."""
    path = folder / "log.txt"
    return len(EpochLog.read(path)) if path.exists() else 0


def find_folder(runs: Path, run: Run) -> Path:
    """A run's folder: one that ends with its identity, made for any arm or study, or a new one."""
    return next(iter(sorted(runs.glob(f"*-{run.identity}"))), runs / run.folder)


def is_finished(folder: Path) -> bool:
    """Whether a run has ended and left its results."""
    return bool(read_record(folder).get("finished"))
