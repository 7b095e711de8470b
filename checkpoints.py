"""Checkpoints: one function that assembles one, one that writes it, one that reads any.

A checkpoint is a plain dict with DeiT's keys, saved by ``torch.save``, so ``torch.load(path, weights_only=True)`` reads
it anywhere. The zip archive's comment is ``sha256=<64 hex digits>`` over all bytes before the digits: one flipped bit
or a missing tail is noticed before anything is parsed. Reading is weights-only always: no code in a file ever runs.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

import fetch

logger = logging.getLogger(__name__)

FORMAT = 1
CURRENT, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_prev.pth", "best_checkpoint.pth"
PREFIXES = ("module.", "_orig_mod.")  # put before every name by DistributedDataParallel and torch.compile
DIGEST_TAG = b"sha256="
DIGEST_LENGTH = 64
ZIP_START, ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
OTHER_FORMATS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used; the message names the file, the fault and the way out."""


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
) -> dict[str, Any]:
    """The full state of a training run. Random and learning-rate state are functions of (seed, epoch): not in it.

    Args:
        model: The model being trained; wrappers' name prefixes are removed.
        model_ema: timm's ``ModelEmaV3`` (or its module), None without EMA.
        optimizer: Its state is saved, as is the gradient scaler's if there is one.
        scaler: Has ``state_dict()``, or None.
        epoch: Last finished epoch, -1 when there is none.
        step: Batches done of the epoch after it, 0 at the end of an epoch.
        meters: Running sums of the unfinished epoch, empty at the end of an epoch.
        max_accuracy: Best accuracies so far, in percent.
        args: The parsed arguments; saved as a dict of JSON types, anything else as its ``str()``.
    """
    checkpoint = {
        "model": _strip_prefixes(model.state_dict(), "the model"),
        "model_ema": None if model_ema is None else _strip_prefixes(model_ema.state_dict(), "the EMA model"),
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "epoch": int(epoch),
        "step": int(step),
        "meters": _plain(meters),
        "max_accuracy": _plain(max_accuracy),
        "args": _plain(vars(args)),
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


def _strip_prefixes(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    stripped: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if name in stripped:
            raise CheckpointError(f"{source}: '{name}' occurs twice, with and without a {' or '.join(PREFIXES)} prefix")
        stripped[name] = tensor
    return stripped


# ---- write ----


def save(checkpoint: dict[str, Any], folder: str | Path, *, is_best: bool = False, keep: int = 0) -> None:
    """Writes ``checkpoint.pth``; further names of it are hard links and cost no space until the next save.

    Args:
        checkpoint: From `assemble`.
        folder: The output folder, which must exist.
        is_best: Also make it ``best_checkpoint.pth``.
        keep: If positive and this is the end of an epoch, also keep it as ``checkpoint_<epoch, four digits>.pth`` and
            remove all but the ``keep`` most recently written of these. 0 leaves them alone.

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

    The new file is complete and on the disk under a temporary name before it takes the place of the old one, and the
    old one becomes ``<stem>_prev.pth`` only after that, so even a damaged old file never replaces the last good one.

    Further names in ``copies`` are given before that, and the numbered checkpoints that ``keep`` (see `save`) leaves no
    place for are removed: a run that is killed in between does its last steps again and does this once more, while a
    best checkpoint that is missing afterwards would stay missing.

    Raises:
        CheckpointError: It could not be written (disk full, read-only folder); what was there is untouched.
    """
    path = Path(path)
    for abandoned in path.parent.glob("*checkpoint*.pth.????????.tmp"):
        _discard(abandoned)  # of a save that was killed
    temporary, old = _temporary_name(path), _temporary_name(path)
    try:
        with open(temporary, "x+b") as file:
            torch.save(checkpoint, file)
            _append_digest(file)
            file.flush()
            os.fsync(file.fileno())
        for copy in copies:
            _duplicate(temporary, copy)
        for excess in _numbered(path.parent)[keep:] if keep else ():
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
        # While a failed write is on its way out, torch's writer raises a RuntimeError about its position.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"{path} could not be written ({_first_line(cause)}); earlier checkpoints are untouched: "
            "free some space, or choose another --output_dir"
        ) from error
    finally:
        _discard(temporary)
        _discard(old)


def _append_digest(file: BinaryIO) -> None:
    """Turns the end of the zip archive just written into one with the digest as its comment (APPNOTE 4.3.16)."""
    end = file.seek(-22, os.SEEK_END)
    record = file.read()
    if not record.startswith(ZIP_END) or record[-2:] != b"\0\0":
        raise RuntimeError("torch.save did not end the file with a plain zip end record")
    file.seek(end + 20)
    file.write((len(DIGEST_TAG) + DIGEST_LENGTH).to_bytes(2, "little") + DIGEST_TAG)
    digest = _sha256(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(digest)


def _sha256(file: BinaryIO, length: int) -> bytes:
    """Hex digits of the hash of the first ``length`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()


def _duplicate(source: Path, target: Path) -> None:
    """Gives a file a second name in one step, by a hard link, or by a copy where there are none."""
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


def _numbered(folder: Path) -> list[Path]:
    """The files kept by ``keep``, last written first: numbers of an earlier, longer run must not win."""
    files = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint_\d{4,}\.pth", path.name)]
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


# ---- read ----


def read(source: str | Path, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Reads any checkpoint file, weights-only: nothing in it is executed.

    Accepted are ``torch.save`` files (zip or the older format) and safetensors, told apart by content, holding a bare
    state dict, ``{"model": ...}``, ``{"state_dict": ...}`` or only the EMA's weights (``model_ema``,
    ``state_dict_ema``); ``args`` may be a Namespace, as DeiT saves it. Our own files need their digest, other zip files
    are checked by their records' CRC. Bits flipped in the tensors of the two remaining formats cannot be noticed.

    Args:
        source: A path, an http(s) URL or ``hf-hub:owner/name[@revision][/file]``; see `fetch.local_file`.
        cache_dir: Of files from the Hub; None: the Hub's own.

    Returns:
        All entries of the file; ``model`` (and ``model_ema``, if there) is a state dict without wrapper prefixes,
        ``args`` a dict. Tensors are on the CPU.

    Raises:
        CheckpointError: Nothing there, damaged, another kind of file, refused, or without a state dict.
    """
    try:
        path = fetch.local_file(source, cache_dir)
    except fetch.FetchError as error:
        raise CheckpointError(str(error)) from error
    try:
        return _read_file(path, str(source))
    except CheckpointError:
        fetch.forget(source, path)
        raise


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
            return path, _read_file(path, str(path), own=True)
        except CheckpointError as error:
            logger.warning("skipping a checkpoint that cannot be used: %s", error)
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise CheckpointError(
            f"{folder}: none of its checkpoints can be used ({names}): use --resume with another file "
            f"(such as its {BEST}) and another --output_dir, or remove them to start from scratch"
        )
    return None


def _read_file(path: Path, source: str, own: bool = False) -> dict[str, Any]:
    """``own``: the file must carry our digest, as every file that auto-reload may take."""
    try:
        with open(path, "rb") as file:
            return _unpack(_load(file, source, own), source)
    except FileNotFoundError as error:
        raise CheckpointError(f"{source}: no such file: check the path") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{source}: is a folder: name the file in it, such as {path / CURRENT}") from error
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be opened ({error.strerror}): check its permissions") from error


def _load(file: BinaryIO, source: str, own: bool) -> Any:
    head, size = file.read(512), os.fstat(file.fileno()).st_size
    again = "copy or download it again"
    is_zip = head.startswith(ZIP_START)
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000  # its own header limit
    if not is_zip and not is_safetensors and not head.startswith(b"\x80"):
        found = next((kind for start, kind in OTHER_FORMATS.items() if head.startswith(start)), None)
        found = found or ("empty" if not head else "a text file" if b"\0" not in head and head.isascii() else "unknown")
        raise CheckpointError(f"{source}: is not a checkpoint (.pth or .safetensors), its content is {found}: {again}")
    digest = _stored_digest(file, size)
    if digest is not None and digest != _sha256(file, size - DIGEST_LENGTH):
        raise CheckpointError(f"{source}: is damaged, its SHA-256 digest does not fit its content: {again}")
    no_digest = f"{source}: has no SHA-256 digest at its end, so it is cut short or was not written by this repository"
    if own and digest is None:
        raise CheckpointError(f"{no_digest}: pass files from elsewhere with --resume")
    file.seek(0)
    try:
        if is_safetensors:
            return safetensors.torch.load(file.read())
        if is_zip and digest is None and (record := zipfile.ZipFile(file).testzip()):
            raise zipfile.BadZipFile(f"wrong CRC of record {record}")
        file.seek(0)
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on foreign data the three parsers fail in any way, up to KeyError and MemoryError
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{source}: refused, it asks for the Python object {refused.group(1)}; nothing in it was executed: "
                "ask its author for a file of tensors only (a state dict or .safetensors)"
            ) from error
        raise CheckpointError(
            f"{source}: cannot be read as a checkpoint, truncated or damaged ({_first_line(error)}): {again}"
        ) from error
    if digest is None and isinstance(loaded, dict) and "format" in loaded:
        raise CheckpointError(f"{no_digest}: {again}")
    return loaded


def _stored_digest(file: BinaryIO, size: int) -> bytes | None:
    file.seek(max(0, size - len(DIGEST_TAG) - DIGEST_LENGTH))
    tail = file.read()
    return tail[len(DIGEST_TAG) :] if tail.startswith(DIGEST_TAG) else None


def _unpack(loaded: Any, source: str) -> dict[str, Any]:
    """Brings every accepted layout to one: ``model`` is the state dict, ``model_ema`` the EMA's if there is one."""
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{source}: holds a {type(loaded).__name__}, no state dict: pass a model's checkpoint")
    found = dict(loaded)
    for timm_key, key in (("state_dict", "model"), ("state_dict_ema", "model_ema")):
        if timm_key in found and key not in found:
            found[key] = found.pop(timm_key)
    if found.get("model") is None:
        found = {**found, "model": found["model_ema"]} if found.get("model_ema") else {"model": loaded}
    for key in ("model", "model_ema"):
        state_dict = found.get(key)
        if state_dict is None and key == "model_ema":
            continue
        if (
            not isinstance(state_dict, dict)
            or not state_dict
            or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state_dict.items())
        ):
            keys = ", ".join(map(str, list(loaded)[:10]))
            raise CheckpointError(
                f"{source}: no state dict in it (its keys: {keys or 'none'}): expected names and tensors, "
                "either bare or under 'model' or 'state_dict'"
            )
        found[key] = _strip_prefixes(state_dict, source)
    if isinstance(found.get("args"), argparse.Namespace):
        found["args"] = dict(vars(found["args"]))
    if isinstance(found.get("format"), int) and found["format"] > FORMAT:
        raise CheckpointError(f"{source}: has format {found['format']}, newer than {FORMAT}: update this repository")
    return found


def _first_line(error: Exception) -> str:
    """An error in one line, without torch's advice to load unsafely."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].split(" In PyTorch 2.6")[0].strip()
    return f"{type(error).__name__}: {text[:200].splitlines()[0]}" if text else type(error).__name__
