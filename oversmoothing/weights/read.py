"""Reads any checkpoint file, weights-only: no code in a file ever runs.

A checkpoint of this repository is a plain dict with DeiT's keys, saved by ``torch.save``. Its zip archive's comment is
``sha256=<64 hex digits>`` over all bytes before the digits: a flipped bit or a missing end is noticed before anything
is parsed.
"""

import argparse
import hashlib
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from torch import Tensor

from . import fetch, schema, unpickle

_logger = logging.getLogger(__name__)

FORMAT = 1
PREFIXES = ("module.", "_orig_mod.")  # put before every name by DistributedDataParallel and torch.compile
DIGEST_TAG = b"sha256="
DIGEST_LENGTH = 64
ZIP_START = b"PK\x03\x04"
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


def read_checkpoint(source: str | Path, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Reads any checkpoint file, weights-only: nothing in it is executed.

    It accepts ``torch.save`` files (zip or the older format) and safetensors, recognised by their content. They may
    hold a bare state dict, ``{"model": ...}``, ``{"state_dict": ...}`` or only the EMA's weights (``model_ema``,
    ``state_dict_ema``); ``args`` may be a Namespace, as DeiT saves it. Our own files need their digest, other zip files
    are checked by their records' CRC. In the older format and in safetensors, bits flipped in tensors go unnoticed.

    Args:
        source: A path, an http(s) URL or ``hf-hub:owner/name[@revision][/file]``; see `fetch.local_file`.
        cache_dir: Cache for files from the Hub; None: the Hub's own.

    Returns:
        All entries of the file; ``model`` (and ``model_ema``, if there) is a state dict without wrapper prefixes,
        ``args`` a dict. Tensors are on the CPU.

    Raises:
        CheckpointError: If the file is missing, damaged, of another kind, refused, or has no state dict.
    """
    try:
        path = fetch.local_file(source, cache_dir)
    except fetch.FetchError as error:
        raise CheckpointError(str(error)) from error
    try:
        return read_file(path, str(source))
    except CheckpointError:
        fetch.forget(source, path)
        raise


def read_file(path: Path, source: str, own: bool = False) -> dict[str, Any]:
    """As ``read_checkpoint``, for a local file. With ``own`` it must carry our digest, as auto-reload demands."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{source}: is a FIFO, device or socket, no file: check the path")
            return _unpack(_load(file, source, own), source, own)
    except FileNotFoundError as error:
        raise CheckpointError(f"{source}: no such file: check the path") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{source}: is a folder: name a file in it, such as its checkpoint.pth") from error
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be opened ({error.strerror}): check its permissions") from error


def _load(file: BinaryIO, source: str, own: bool) -> Any:
    head, size = file.read(512), os.fstat(file.fileno()).st_size
    again = "copy or download it again"
    is_zip = head.startswith(ZIP_START)
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000  # the format's limit
    if not is_zip and not is_safetensors and not head.startswith(b"\x80"):
        found = next((kind for start, kind in OTHER_FORMATS.items() if head.startswith(start)), None)
        found = found or ("empty" if not head else "a text file" if b"\0" not in head and head.isascii() else "unknown")
        raise CheckpointError(f"{source}: is not a checkpoint (.pth or .safetensors), its content is {found}: {again}")
    digest = _stored_digest(file, size)
    if digest is not None and digest != sha256(file, size - DIGEST_LENGTH):
        raise CheckpointError(f"{source}: is damaged, its SHA-256 digest does not fit its content: {again}")
    no_digest = f"{source}: has no SHA-256 digest at its end, so it is cut short or was not written by this repository"
    if own and digest is None:
        raise CheckpointError(f"{no_digest}: pass files from elsewhere with --resume")
    file.seek(0)
    try:
        if is_safetensors:
            return safetensors.torch.load(file.read())
        loaded = unpickle.load(file)
    except unpickle.Refused as error:
        raise CheckpointError(
            f"{source}: refused, it asks for the Python object {error}; nothing in it was executed: "
            "ask its author for a file of dense tensors only (a state dict or .safetensors)"
        ) from error
    except Exception as error:  # on foreign data the parsers raise anything, up to KeyError and MemoryError
        raise CheckpointError(
            f"{source}: cannot be read as a checkpoint, truncated or damaged ({first_line(error)}): {again}"
        ) from error
    if digest is None and isinstance(loaded, dict) and "format" in loaded:
        raise CheckpointError(f"{no_digest}: {again}")
    return loaded


def _stored_digest(file: BinaryIO, size: int) -> bytes | None:
    file.seek(max(0, size - len(DIGEST_TAG) - DIGEST_LENGTH))
    tail = file.read()
    return tail[len(DIGEST_TAG) :] if tail.startswith(DIGEST_TAG) else None


def _unpack(loaded: Any, source: str, own: bool) -> dict[str, Any]:
    """Converts every accepted layout to one: ``model`` is the state dict, ``model_ema`` the EMA's if there is one."""
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
        if not schema.is_state_dict(state_dict):
            keys = ", ".join(ascii(name)[:80] for name in list(loaded)[:10])
            raise CheckpointError(
                f"{source}: no state dict in it (its keys: {keys or 'none'}): expected names and tensors, "
                "either bare or under 'model' or 'state_dict'"
            )
        found[key] = strip_prefixes(state_dict, source)
    if isinstance(found.get("args"), argparse.Namespace):
        found["args"] = dict(vars(found["args"]))
    for name, wanted in list(schema.faults(found)):
        if own or "format" in found:
            raise CheckpointError(
                f"{source}: its entry {name!r} is not {wanted}, as this repository writes it: take another checkpoint "
                "of that run"
            )
        _logger.warning(f"{source}: its entry {name!r} is left out, it is not {wanted}")
        del found[name]
    if (found.get("format") or 0) > FORMAT:
        raise CheckpointError(f"{source}: has format {found['format']}, newer than {FORMAT}: update this repository")
    return found


def first_line(error: BaseException) -> str:
    """Describes an error in one line of plain characters."""
    text = str(error).strip()
    return f"{type(error).__name__}: {ascii(text.splitlines()[0][:200])[1:-1]}" if text else type(error).__name__


def strip_prefixes(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    stripped: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if name in stripped:
            raise CheckpointError(f"{source}: '{name}' occurs twice, with and without a {' or '.join(PREFIXES)} prefix")
        stripped[name] = tensor
    return stripped


def sha256(file: BinaryIO, length: int) -> bytes:
    """Hex digits of the hash of the first ``length`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()
