"""Images inside ``.tar`` and ``.zip`` files, read in place: where each begins, and how its bytes are fetched.

An index is made once, from the headers of a tar or the directory of a zip; an image is then one read at a known place.
Reads carry their own position (``os.pread``), so processes that were forked from one another may share a file.
"""

import logging
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

_logger = logging.getLogger(__name__)

SUFFIXES = (".tar", ".zip")
MAX_OPEN_FILES = 64  # of a process; with ten workers far below the usual limit of 1,024 for each
LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name


class DataError(ValueError):
    """The data cannot be used as asked; the message is one sentence for the user."""


class Member(NamedTuple):
    """One file of an archive.

    Attributes:
        archive: Path of the archive.
        name: Its name there.
        start: First byte of its content (tar) or of its header (zip).
        size: Bytes that are stored.
        method: How: ``TAR``, or zip's own number for stored or deflated.
    """

    archive: str
    name: str
    start: int
    size: int
    method: int

    def read(self) -> bytes:
        """Content of the file.

        Raises:
            OSError: If the archive cannot be read there.
            zlib.error: If compressed content is damaged.
        """
        file, start = descriptor(self.archive), self.start
        if self.method != TAR:
            # The header's own name and extra field may be longer than the directory's.
            header = os.pread(file, LOCAL_HEADER, start)
            start += LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        content = os.pread(file, self.size, start)
        if len(content) < self.size:
            raise OSError(f"the archive ends {self.size - len(content)} bytes too early")
        return zlib.decompress(content, wbits=-15) if self.method == zipfile.ZIP_DEFLATED else content

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


TAR = -1


class Members(Sequence):
    """(:class:`Member`, label) of many images, about 70 bytes each: one array, which worker processes share.

    Args:
        archives: Paths.
        table: From :func:`make_table`; its first column counts ``archives``.
    """

    def __init__(self, archives: list[str], table: np.ndarray) -> None:
        self.archives, self.table = archives, table

    @property
    def targets(self) -> np.ndarray:
        """Labels, shape (number of images,)."""
        return self.table["label"]

    def __getitem__(self, index: int) -> tuple[Member, int]:
        archive, start, size, method, label, name = self.table[index].tolist()
        return Member(self.archives[archive], os.fsdecode(name), start, size, method), label

    def __len__(self) -> int:
        return len(self.table)


def make_table(rows: Iterable[tuple[int, int, int, int, int, str]]) -> np.ndarray:
    """Array of (number of the archive, start, size, method, label, name), one row an image; see :class:`Member`."""
    rows = [(*row, os.fsencode(name)) for *row, name in rows]
    longest = max((len(row[-1]) for row in rows), default=1)
    kinds = {"archive": "i4", "start": "i8", "size": "i8", "method": "i1", "label": "i4", "name": f"S{longest}"}
    return np.array(rows, dtype=list(kinds.items()))


class Tree(NamedTuple):
    """What would be ``root/<class>/**/*.jpg`` if it were unpacked; ``classes`` may lack images."""

    classes: list[str]
    members: Members


_open_files: OrderedDict[str, int] = OrderedDict()  # of this process: a file descriptor by path, the latest used last


def descriptor(path: str) -> int:
    """An open file descriptor of ``path``; only the last ``MAX_OPEN_FILES`` stay open."""
    file = _open_files.pop(path, None)
    if file is None:
        file = os.open(path, os.O_RDONLY)
        for other, held in list(_open_files.items()):
            if os.fstat(held).st_nlink == 0:  # removed, but on the disk for as long as it is open
                os.close(_open_files.pop(other))
        while len(_open_files) >= MAX_OPEN_FILES:
            os.close(_open_files.popitem(last=False)[1])
    _open_files[path] = file
    return file


# --------------------------------------------------------------------------------------------------------------- index


def read_tree(path: Path, split: str, *, alone: bool) -> Tree | None:
    """Images of one split of an archive: of its folder ``<split>/``, at the top or within one enclosing folder.

    Args:
        path: A ``.tar`` (not compressed) or a ``.zip``.
        split: "train" or "val".
        alone: Whether the archive holds this split only, so that the class folders may be at its top.

    Returns:
        Classes and images in ``ImageFolder``'s order; None if the archive has no such folder.

    Raises:
        DataError: If the archive is damaged, compressed as a whole, or holds what cannot be read in place.
    """
    state = path.stat()
    return _read_trees(str(path), state.st_mtime_ns, state.st_size, (split,) if alone else ("train", "val"), alone)[
        split
    ]


@lru_cache(maxsize=4)  # asked for the classes, for the images, and again by the other split
def _read_trees(path: str, mtime_ns: int, size: int, splits: tuple[str, ...], alone: bool) -> dict[str, Tree | None]:
    if path in _open_files:  # an archive that was written anew
        os.close(_open_files.pop(path))
    _logger.info(f"indexing {path} ({size / 1e9:.1f} GB)")
    files, folders = _list_zip(path) if path.lower().endswith(".zip") else _list_tar(path)
    folders |= {posixpath.dirname(name) for name in files}
    for folder in list(folders):
        while folder := posixpath.dirname(folder):
            folders.add(folder)
    tops = [folder for folder in folders if folder and "/" not in folder]
    trees = {}
    for split in splits:
        within = [f"{top}/{split}" for top in tops if len(tops) == 1]
        prefix = next((f"{folder}/" for folder in [split, *within] if folder in folders), "" if alone else None)
        trees[split] = None if prefix is None else _make_tree(path, prefix, files, folders)
    return trees


def _make_tree(path: str, prefix: str, files: dict[str, tuple[int, int, int]], folders: set[str]) -> Tree:
    """Classes and images below ``prefix``, sorted as ``ImageFolder`` sorts: by class, folder and file name."""
    below = (folder[len(prefix) :] for folder in folders if folder.startswith(prefix))
    classes = sorted({folder for folder in below if folder and "/" not in folder and folder[0] != "."})
    labels = {name: label for label, name in enumerate(classes)}
    rows = []
    for name, place in files.items():
        folder, _, file = name[len(prefix) :].rpartition("/")
        label = labels.get(folder.partition("/")[0])
        if label is not None and name.startswith(prefix) and file.lower().endswith(IMG_EXTENSIONS):
            rows.append((label, folder, file, name, *place))
    rows.sort()
    return Tree(classes, Members([path], make_table((0, *place, label, name) for label, _, _, name, *place in rows)))


class TarEntry(NamedTuple):
    """One header of a tar: ``kind`` is "file", "folder", "link" (then ``target`` is a name) or "other"."""

    name: str
    kind: str
    start: int
    size: int
    target: str = ""


def tar_entries(path: str) -> Iterator[TarEntry]:
    """Entries of a tar in their order.

    Raises:
        DataError: If it is no plain tar, or is cut short or damaged anywhere; that is, after its last good entry.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            while (entry := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep a kilobyte of every entry
                name = _normal(entry.name)
                if entry.isreg() and entry.sparse is None:
                    yield TarEntry(name, "file", entry.offset_data, entry.size)
                elif entry.islnk() or entry.issym():
                    base = posixpath.dirname(name) if entry.issym() else ""
                    yield TarEntry(name, "link", 0, 0, _normal(posixpath.join(base, entry.linkname)))
                else:
                    yield TarEntry(name, "folder" if entry.isdir() else "other", 0, 0)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile takes whatever is no header for the end
                raise tarfile.ReadError(f"no entry and no end mark at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"--data-path: {path} is no tar file that images can be read from in place ({error}): a compressed one has "
            "to be repacked without compression, a damaged one fetched again"
        ) from error


def _list_tar(path: str) -> tuple[dict[str, tuple[int, int, int]], set[str]]:
    """Files by name as (start, size, method), and the names of the folders."""
    files, folders, links = {}, set(), {}
    for entry in tar_entries(path):
        if _is_of_macos(entry.name):
            continue
        if entry.kind == "folder":
            folders.add(entry.name)
        elif entry.kind == "file":
            files[entry.name] = (entry.start, entry.size, TAR)
        else:
            links[entry.name] = entry.target
    for name, target in links.items():
        for _ in range(40):  # as many as Linux follows
            target = links.get(target, target)
        if target in files:
            files[name] = files[target]
        elif posixpath.splitext(name)[1].lower() in ("", *IMG_EXTENSIONS):  # an image or perhaps a class
            raise DataError(
                f"--data-path: {path} holds {name} only as a link to {target or 'a special file'}, which is not in it: "
                "pack the images themselves (tar --dereference)"
            )
    return files, folders


def _list_zip(path: str) -> tuple[dict[str, tuple[int, int, int]], set[str]]:
    """As :func:`_list_tar`."""
    files, folders = {}, set()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DataError(f"--data-path: {path} is no zip file ({error}), or is cut short: fetch it again") from error
    for entry in entries:
        name = _normal(entry.filename)
        if _is_of_macos(name):
            continue
        if entry.is_dir():
            folders.add(name)
        else:
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"--data-path: {path} holds {name} encrypted or compressed in a way that cannot be read in place: "
                    "repack it with zip -0"
                )
            files[name] = (entry.header_offset, entry.compress_size, entry.compress_type)
    return files, folders


def _normal(name: str) -> str:
    """Name without ``./`` and without slashes around it; the top is ''."""
    name = posixpath.normpath(name).lstrip("/")
    return "" if name == "." else name


def _is_of_macos(name: str) -> bool:
    """Whether an entry is what a Mac's tar and zip put beside the files."""
    return name.startswith("__MACOSX") or posixpath.basename(name).startswith("._")
