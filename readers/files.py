"""Reading of untrusted files: only regular files, and only up to a limit."""

import os
import stat
from pathlib import Path

MAX_FILE = 256 << 20  # bytes of an image, packed or not: Pillow refuses pictures that are larger than that as bytes


def open_file(path: str | Path, flags: int = 0) -> int:
    """File descriptor of a regular file, for reading.

    Opening a FIFO would block, and opening a device may act. Both are refused, even if one replaces the file meanwhile.

    Raises:
        OSError: If it is not there, or is no regular file.
    """
    _refuse(os.stat(path, follow_symlinks=not flags & os.O_NOFOLLOW))
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    try:
        _refuse(os.fstat(file))
    except OSError:
        os.close(file)
        raise
    return file


def _refuse(state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise OSError("is a folder, FIFO, device or link, not a regular file")


def read_file(path: str | Path, limit: int = MAX_FILE, flags: int = 0) -> bytes:
    """Content of a regular file.

    Raises:
        OSError: As `open_file`, and if there are more than ``limit`` bytes.
    """
    with os.fdopen(open_file(path, flags), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(f"is larger than {limit >> 20} MB")
        return file.read(size)  # read(limit) would map that much memory first, 0.2 ms for each image
