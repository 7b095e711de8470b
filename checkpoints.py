"""Checkpoints of a run: one function that assembles one, one that writes it, one that finds the newest.

A checkpoint is a plain dict with DeiT's keys, saved by ``torch.save``, so ``torch.load(path, weights_only=True)`` reads
it anywhere. ``oversmoothing/weights/read.py`` reads it and defines its digest.
"""

import argparse
import contextlib
import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.optim import Lookahead
from torch import Tensor, nn

from oversmoothing.weights.read import (
    DIGEST_LENGTH,
    DIGEST_TAG,
    FORMAT,
    CheckpointError,
    first_line,
    read_file,
    sha256,
    strip_prefixes,
)
from utils import SetupError

logger = logging.getLogger(__name__)

CURRENT, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_prev.pth", "best_checkpoint.pth"
ZIP_END = b"PK\x05\x06"


# ---- assemble ----


def assemble(
    *,
    model: nn.Module,
    model_ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    epoch: int,
    step: int,
    meters: Mapping[str, Any],
    max_accuracy: Mapping[str, float],
    args: argparse.Namespace,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The full state of a training run. Random and learning-rate state are functions of (seed, epoch): not in it.

    Args:
        model: The model being trained; wrappers' name prefixes are removed.
        model_ema: timm's ``ModelEmaV3`` (or its module), None without EMA.
        optimizer: Its state is saved, as is the gradient scaler's if there is one.
        scaler: Has ``state_dict()``, or None.
        epoch: Last finished epoch, -1 when there is none.
        step: Batches done in the epoch after that, 0 at the end of an epoch.
        meters: Running sums of the unfinished epoch, empty at the end of an epoch.
        max_accuracy: Best accuracies so far, in percent.
        args: The parsed arguments; saved as a dict of JSON types, anything else as its ``str()``.
        data: From ``datasets.fingerprint``, of the training images.
    """
    state = optimizer.state_dict()
    checkpoint = {
        "model": strip_prefixes(model.state_dict(), "the model"),
        "model_ema": None if model_ema is None else strip_prefixes(model_ema.state_dict(), "the EMA model"),
        # Kron's state also has its random state. It is left out: optim.seed_draws sets it at every step.
        "optimizer": {name: state[name] for name in ("state", "param_groups")},
        "optimizer_class": optimizer_class(optimizer),
        "scaler": None if scaler is None else scaler.state_dict(),
        "epoch": int(epoch),
        "step": int(step),
        "meters": _plain(meters),
        "max_accuracy": _plain(max_accuracy),
        "args": _plain(vars(args)),
        "data": None if data is None else dict(data),
        "format": FORMAT,
    }
    return _to_cpu(checkpoint)


def _plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of JSON types only: numpy values and tensors become numbers, anything else (a path, a dtype) its str."""

    def plain_value(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    return json.loads(json.dumps(dict(mapping), default=plain_value))


def _to_cpu(value: Any) -> Any:
    """Tensors moved to the CPU: a file with CUDA tensors needs map_location on a machine without CUDA."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(entry) for key, entry in value.items()}
    return type(value)(_to_cpu(entry) for entry in value) if type(value) in (list, tuple) else value


# ---- write ----


def save(checkpoint: dict[str, Any], folder: str | Path, *, is_best: bool = False, keep: int = 0) -> None:
    """Writes ``checkpoint.pth``; further names of it are hard links and cost no space until the next save.

    Args:
        checkpoint: From `assemble`.
        folder: The output folder, which must exist.
        is_best: Also make it ``best_checkpoint.pth``.
        keep: If positive and this is the end of an epoch, also keep it as ``checkpoint_<epoch, four digits>.pth`` and
            remove all but the ``keep`` last epochs of these. 0 leaves them alone.

    Raises:
        CheckpointError: It could not be written; the checkpoints already there are untouched.
    """
    folder = Path(folder)
    copies = [folder / BEST] if is_best else []
    numbered = keep > 0 and checkpoint["step"] == 0 and checkpoint["epoch"] >= 0
    if numbered:
        copies.append(folder / f"checkpoint_{checkpoint['epoch']:04d}.pth")
    write(checkpoint, folder / CURRENT, copies=copies, keep=keep if numbered else 0)


def write(
    checkpoint: dict[str, Any],
    path: str | Path,
    *,
    keep_previous: bool = True,
    copies: Sequence[Path] = (),
    keep: int = 0,
) -> None:
    """Writes a checkpoint with its digest so that a kill or power loss at any instant leaves a good file.

    The new file is complete and on the disk under a temporary name before it takes the place of the old one. Only then
    does the old one become ``<stem>_prev.pth``, so even a damaged old file never replaces the last good one.

    Before that, the file gets its further names in ``copies``, and numbered checkpoints beyond ``keep`` (see `save`)
    are removed. A run that is killed in between repeats its last steps and does both again. In the other order, the
    best checkpoint could stay missing.

    Raises:
        CheckpointError: It could not be written (disk full, read-only folder); what was there is untouched.
    """
    path = Path(path)
    discard_abandoned(path.parent)
    temporary, old = _temporary_name(path), _temporary_name(path)
    try:
        with open(temporary, "x+b") as file:
            torch.save(checkpoint, file)
            _append_digest(file)
            file.flush()
            os.fsync(file.fileno())
        for copy in copies:
            _duplicate(temporary, copy)
        for excess in _numbered(path.parent, checkpoint["epoch"])[keep:] if keep else ():
            _discard(excess)
        previous = path.with_name(f"{path.stem}_prev{path.suffix}")
        if keep_previous and path.exists():
            try:
                os.link(path, old)
            except OSError:  # no hard links here (FUSE, FAT, another owner): a moment with the previous file only
                _rename(path, previous)
        _rename(temporary, path)
        if old.exists():
            _rename(old, previous)
    except (OSError, RuntimeError) as error:
        # While the exception of a failed write propagates, torch's writer raises a RuntimeError about its position.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"{path} could not be written ({first_line(cause)}); earlier checkpoints are untouched: "
            "free some space, or choose another --output_dir"
        ) from error
    finally:
        _discard(temporary)
        _discard(old)


def discard_abandoned(folder: Path) -> None:
    """Removes the temporary files of saves that were killed."""
    for file in folder.glob("*checkpoint*.pth.????????.tmp"):
        _discard(file)


def _append_digest(file: BinaryIO) -> None:
    """Adds the digest as the comment of the zip archive just written (APPNOTE 4.3.16)."""
    end = file.seek(-22, os.SEEK_END)
    record = file.read()
    if not record.startswith(ZIP_END) or record[-2:] != b"\0\0":
        raise RuntimeError("torch.save did not end the file with a plain zip end record")
    file.seek(end + 20)
    file.write((len(DIGEST_TAG) + DIGEST_LENGTH).to_bytes(2, "little") + DIGEST_TAG)
    digest = sha256(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(digest)


def _duplicate(source: Path, target: Path) -> None:
    """Gives a file a second name in one step: by a hard link, or by a copy if the file system has no hard links."""
    temporary = _temporary_name(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copy2(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        _rename(temporary, target)
    finally:
        _discard(temporary)


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # gone already, or a read-only folder: the error to report is another one
        temporary.unlink()


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(folder)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def _numbered(folder: Path, epoch: int | None = None) -> list[Path]:
    """The files kept by ``keep``, by the epoch in their names, last first; those after ``epoch`` come at the end.

    A number above the epoch being saved belongs to an earlier, longer run and must not count as newer. File times are
    no guide: clocks go back, and copies are new.
    """
    numbers = {}
    for name in os.listdir(folder):
        if found := re.fullmatch(r"checkpoint_(\d{4,})\.pth", name):
            numbers[folder / name] = int(found[1])
    return sorted(numbers, key=lambda path: (epoch is not None and numbers[path] > epoch, -numbers[path], path.name))


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turns an ``OSError`` within the context, such as a full disk, into a ``SetupError`` that says what to do."""
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"--output_dir {folder}: writing failed ({error.strerror}); earlier checkpoints are untouched: fix that "
            "(free some space), then the same command with --auto_reload continues"
        ) from error


def set_aside(folder: Path, names: list[str]) -> Path | None:
    """Moves the named files into a new sub-folder ``earlier-<n>`` and returns it; None where there are none."""
    files = [folder / name for name in names if os.path.lexists(folder / name)]  # dangling links too
    if not files:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    target = folder / f"earlier-{number}"
    target.mkdir()
    for file in files:
        file.rename(target / file.name)
    return target


# ---- find and resume ----


def latest(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest good checkpoint this repository wrote into a folder, as (path, checkpoint); None if there is none.

    Order: ``checkpoint.pth``, the one before it, then the numbered ones. A damaged one is skipped with a warning.

    Raises:
        CheckpointError: There are checkpoints, but every one is damaged; never a silent start from scratch.
    """
    folder = Path(folder)
    try:
        candidates = [folder / name for name in (CURRENT, PREVIOUS) if name in os.listdir(folder)] + _numbered(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot look for a checkpoint to reload ({error.strerror})") from error
    for path in candidates:
        try:
            return path, read_file(path, str(path), own=True)
        except CheckpointError as error:
            logger.warning("skipping a checkpoint that cannot be used: %s", error)
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise CheckpointError(
            f"{folder}: none of its checkpoints can be used ({names}): use --resume with another file "
            f"(such as its {BEST}) and another --output_dir, or remove them to start from scratch"
        )
    return None


def can_resume(checkpoint: Mapping[str, Any], missing: list[str]) -> bool:
    """Whether training goes on from this checkpoint; otherwise it gives weights only and training starts at epoch 0.

    Args:
        checkpoint: From ``read_checkpoint`` or `latest`.
        missing: What `load_weights` returned; new parameters make a run a fine-tune of the checkpoint.
    """
    return isinstance(checkpoint.get("optimizer"), dict) and isinstance(checkpoint.get("epoch"), int) and not missing


def optimizer_class(optimizer: torch.optim.Optimizer) -> str:
    """Class name of an optimizer, saved with its state; for ``lookahead_`` with the wrapped optimizer's."""
    inner = f"({optimizer_class(optimizer._base_optimizer)})" if isinstance(optimizer, Lookahead) else ""
    return f"{type(optimizer).__qualname__}{inner}"


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], saved_class: str | None = None, source: str = "the file"
) -> None:
    """Takes each parameter's moments and step count from ``checkpoint["optimizer"]``.

    Hyper-parameters (lr, weight decay, betas) stay as the command line gave them to ``optimizer``. Every entry is first
    compared with the one this optimizer makes for such a parameter: its step would not notice a tensor of another
    shape, and would write beyond its end.

    Args:
        optimizer: Of this run, before its first step.
        saved: The "optimizer" entry of a checkpoint from ``read_checkpoint``.
        saved_class: The checkpoint's ``optimizer_class``; None if an older version or another program wrote it.
        source: Where it came from, for messages.

    Raises:
        CheckpointError: The saved state is of other parameter groups or another kind of optimizer.
    """
    way_out = "resume with the --opt, --model and options it was saved with, or pass it with --finetune (weights only)"
    ours = optimizer_class(optimizer)
    if saved_class not in (None, ours):
        raise CheckpointError(f"{source}: its optimizer is {saved_class}, this run's --opt is {ours}: {way_out}")
    groups, old_groups = optimizer.param_groups, saved["param_groups"]
    sizes, old_sizes = ([len(group["params"]) for group in some] for some in (groups, old_groups))
    if sizes != old_sizes:
        raise CheckpointError(
            f"{source}: its optimizer has parameter groups of sizes {old_sizes}, this run's has {sizes}: {way_out}"
        )
    new_groups = []
    for group, old in zip(groups, old_groups, strict=True):
        stand_ins, counters = _dry_run(optimizer, group)
        for parameter, number in zip(group["params"], old["params"], strict=True):
            begun, wanted = stand_ins[parameter.shape, parameter.dtype]
            found = {name: _form(value, name) for name, value in saved["state"].get(number, {}).items()}
            fault = next((name for name in [*wanted, *found] if not _fits(name, found, wanted, begun)), None)
            if found and fault is not None:
                raise CheckpointError(
                    f"{source}: the state of its optimizer does not fit --opt ({ours}): {fault!r} of a parameter of "
                    f"shape {tuple(parameter.shape)} is {found.get(fault, 'missing')}, not "
                    f"{wanted.get(fault, 'known')}: {way_out}"
                )
        for name, form in counters.items():
            if name in old and _form(old[name]) != form:
                raise CheckpointError(
                    f"{source}: {name!r} of its optimizer is {_form(old[name])}, not {form}: {way_out}"
                )
        progress = {name: old[name] for name in counters if name in old}
        options = {name: value for name, value in group.items() if name != "params"}
        new_groups.append({**options, **progress, "params": old["params"]})
    optimizer.load_state_dict({"state": saved["state"], "param_groups": new_groups})


def _dry_run(optimizer: torch.optim.Optimizer, group: dict) -> tuple[dict, dict[str, Any]]:
    """Finds what an optimizer's state holds, by steps on stand-ins: one for each shape and type in a parameter group.

    Returns:
        (shape, dtype) -> forms of the state's entries after the first and after the last step; and the forms of those
        entries of the group that are not options but change with the steps.
    """

    def twin_of(optimizer: torch.optim.Optimizer, groups: list[dict]) -> torch.optim.Optimizer:
        if isinstance(optimizer, Lookahead):
            return Lookahead(twin_of(optimizer._base_optimizer, groups))
        return type(optimizer)(groups)

    shapes = {(parameter.shape, parameter.dtype): parameter for parameter in group["params"]}
    stand_ins = [nn.Parameter(torch.zeros_like(parameter)) for parameter in shapes.values()]
    options = {name: value for name, value in group.items() if name != "params"}
    # Eager: Kron compiles its step for every shape.
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        twin = twin_of(optimizer, [{**options, "params": stand_ins}])
        states = []
        for _ in range(1 + group.get("lookahead_k", 1)):
            for stand_in in stand_ins:
                stand_in.grad = torch.ones_like(stand_in)
            twin.step()
            saved = twin.state_dict()
            states.append(
                [
                    {name: _form(value, name) for name, value in saved["state"].get(i, {}).items()}
                    for i in range(len(shapes))
                ]
            )
    after = saved["param_groups"][0]
    counters = {
        name: _form(value)
        for name, value in after.items()
        if name != "params" and (name not in options or repr(options[name]) != repr(value))
    }
    return dict(zip(shapes, zip(states[0], states[-1], strict=True), strict=True)), counters


def _form(value: Any, name: str = "") -> str:
    """Type and shape of an entry; a bool, or a number that no step produces (such as -1), is given as its value."""
    if isinstance(value, Tensor):
        if name == "step" and not value.dim() and not 0 <= value.item() < math.inf:
            return f"{value.item()}"
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a list of {', '.join(map(_form, value)) or 'nothing'}"
    if isinstance(value, bool):
        return str(value)
    if type(value) in (int, float):
        return "a number" if 0 <= value < math.inf else f"{value}"
    return type(value).__name__


def _fits(name: str, found: dict[str, str], wanted: dict[str, str], begun: dict[str, str]) -> bool:
    """Whether an entry has the expected form; one that appears only after several steps may be missing."""
    if name not in found:
        return name not in begun
    # Older versions of torch count steps with a number, newer ones with a tensor.
    return found[name] == wanted.get(name) or (name == "step" and name in wanted and found[name] == "a number")
