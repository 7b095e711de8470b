"""Images inside ``.tar`` and ``.zip`` files, read in place: where each begins, and how its bytes are fetched.

An index is made once, from the headers of a tar or the directory of a zip; an image is then one read at a known place.
Reads carry their own position (``os.pread``), so processes that were forked from one another may share a file.
"""

import io
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

from .files import MAX_FILE, open_file

_logger = logging.getLogger(__name__)

SUFFIXES = (".tar", ".zip")
MAX_OPEN_FILES = 64  # for each process, far below the usual limit of 1,024
LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name
MAX_NAME = 1024  # bytes; the index keeps as many for every name
MAX_DEPTH = 32  # folders above a file
MAX_GLOBALS = 1000  # records of a tar that apply to all entries after them


class DataError(ValueError):
    """The data cannot be used as asked; the message is one sentence for the user."""


class Member(NamedTuple):
    """One file of an archive.

    Attributes:
        archive: Path of the archive.
        name: Its name there.
        start: First byte of its content (tar) or of its header (zip).
        size: Number of stored bytes.
        method: How they are stored: ``TAR``, or zip's own number for stored or deflated.
        crc: CRC-32 of the content, -1 where it is not known.
    """

    archive: str
    name: str
    start: int
    size: int
    method: int
    crc: int

    def read(self) -> bytes:
        """Content of the file.

        Raises:
            OSError: If the archive cannot be read there, or holds something else there.
            zlib.error: If compressed content is damaged.
        """
        if self.size > MAX_FILE:
            raise OSError(f"it is larger than {MAX_FILE >> 20} MB")
        file, start = descriptor(self.archive), self.start
        if self.method != TAR:
            # The header's own name and extra field may be longer than the directory's.
            header = os.pread(file, LOCAL_HEADER, start)
            if len(header) < LOCAL_HEADER or not header.startswith(b"PK\3\4"):
                raise OSError("the archive's directory names a place where no file begins")
            start += LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        content = os.pread(file, self.size, start)
        if len(content) < self.size:
            raise OSError(f"the archive ends {self.size - len(content)} bytes too early")
        if self.method == zipfile.ZIP_DEFLATED:
            unpacking = zlib.decompressobj(wbits=-15)
            content = unpacking.decompress(content, MAX_FILE)
            if not unpacking.eof:
                raise OSError(f"it is cut short, or unpacks to more than {MAX_FILE >> 20} MB")
        if self.crc not in (-1, zlib.crc32(content)):
            raise OSError("its content does not fit its CRC-32: the archive is damaged there")
        return content

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


TAR = -1
Place = tuple[int, int, int, int]  # start, size, method and CRC-32; see Member


class Members(Sequence):
    """(:class:`Member`, label) of many images, about 80 bytes each: one array, which worker processes share.

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
        archive, start, size, method, crc, label, name = self.table[index].tolist()
        return Member(self.archives[archive], os.fsdecode(name), start, size, method, crc), label

    def __len__(self) -> int:
        return len(self.table)


# Columns of an index; the last is the name, as long as the longest.
KINDS = {"archive": "i4", "start": "i8", "size": "i8", "method": "i1", "crc": "i8", "label": "i4"}


def make_table(rows: Iterable[tuple[int, int, int, int, int, int, str]]) -> np.ndarray:
    """Array of (number of the archive, start, size, method, CRC-32, label, name), one row an image; see `Member`."""
    rows = [(*row, os.fsencode(name)) for *row, name in rows]
    longest = max((len(row[-1]) for row in rows), default=1)
    return np.array(rows, dtype=[*KINDS.items(), ("name", f"S{longest}")])


def load_table(content: bytes) -> np.ndarray:
    """The table in the content of an ``.npy`` file, after a check of every number in it.

    Raises:
        ValueError: If it is something else. No more memory is allocated than the file has.
    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kinds = read_header(stream)
    except Exception as error:  # numpy's parser fails in any way, up to SyntaxError and OverflowError
        raise ValueError(f"no numpy array ({brief(error)})") from error
    if kinds.names != (*KINDS, "name") or kinds["name"].kind != "S" or kinds["name"].itemsize > MAX_NAME:
        raise ValueError("its columns are those of another version, or of something else")
    if kinds != np.dtype([*KINDS.items(), ("name", kinds["name"])]):
        raise ValueError("its columns have other types")
    if len(shape) != 1 or shape[0] * kinds.itemsize != len(content) - stream.tell():
        raise ValueError("it is cut short")
    table = np.frombuffer(content, kinds, offset=stream.tell()).copy()
    for column, low, high in (("start", 0, 2**62), ("size", 0, MAX_FILE), ("method", TAR, TAR), ("crc", -1, 2**32 - 1)):
        if not ((low <= table[column]) & (table[column] <= high)).all():
            raise ValueError(f"a {column} is out of range")
    if (table["label"] < 0).any() or (table["archive"] < 0).any():
        raise ValueError("a label or the number of a shard is negative")
    return table


def shown(name: object) -> str:
    """A file's name as part of one line: as it is, or escaped if it would break the line or be invisible in it."""
    text = str(name)
    return text if text.isprintable() and len(text) < 300 else ascii(text)[:300]


def brief(error: BaseException) -> str:
    """An error in one short line of plain characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {ascii(lines[0][:200])[1:-1]}" if lines else type(error).__name__


class Tree(NamedTuple):
    """A tree ``root/<class>/**/*.jpg`` inside an archive; ``classes`` may lack images."""

    classes: list[str]
    members: Members


_open_files: OrderedDict[str, int] = OrderedDict()  # of this process: a file descriptor by path, the latest used last


def descriptor(path: str, flags: int = 0) -> int:
    """An open file descriptor of ``path``; only the last ``MAX_OPEN_FILES`` stay open.

    Args:
        path: Of a regular file.
        flags: Of ``os.open``, where it is not open yet.
    """
    file = _open_files.pop(path, None)
    if file is None:
        file = open_file(path, flags)
        for other, held in list(_open_files.items()):
            if os.fstat(held).st_nlink == 0:  # removed, but it stays on the disk while it is open
                os.close(_open_files.pop(other))
        while len(_open_files) >= MAX_OPEN_FILES:
            os.close(_open_files.popitem(last=False)[1])
    _open_files[path] = file
    return file


def close(path: str) -> None:
    """Closes the file that `descriptor` keeps open, so that the next use opens it anew."""
    file = _open_files.pop(path, None)
    if file is not None:
        os.close(file)


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
    close(path)  # an archive that was written anew
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


def _make_tree(path: str, prefix: str, files: dict[str, Place], folders: set[str]) -> Tree:
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


class DamagedError(DataError):
    """An archive that cannot be read, or not to its end."""


class TarEntry(NamedTuple):
    """One header of a tar: ``kind`` is "file", "folder", "link" (then ``target`` is a name) or "other"."""

    name: str
    kind: str
    start: int
    size: int
    target: str = ""


class _Bounded(io.BufferedReader):
    """A file whose reads stop at its size: Python would first allocate as much memory as a header declares."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(open_file(path)))
        self.length = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        """At most ``size`` bytes, or the whole rest if it is negative or None."""
        rest = max(0, self.length - self.tell())
        return super().read(rest if size is None or size < 0 else min(size, rest))


def tar_entries(path: str) -> Iterator[TarEntry]:
    """Entries of a tar in their order.

    Raises:
        DamagedError: After the last good entry, if it is no plain tar, or is cut short or damaged anywhere.
    """
    try:
        with _Bounded(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            while (entry := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep a kilobyte of every entry
                if entry.size < 0 or tar.offset <= end:
                    raise tarfile.ReadError(f"a negative size of the entry at byte {end}")
                if tar.offset > file.length:
                    raise tarfile.ReadError(f"unexpected end of data in the entry at byte {end}")
                if len(tar.pax_headers) > MAX_GLOBALS:
                    raise tarfile.ReadError("too many records for all entries")
                end = tar.offset
                yield _tar_entry(path, entry)
            # tarfile takes anything that is no header for the end, and so a block of zeros, even if entries follow.
            file.seek(end)
            if len(file.read(512)) < 512:
                raise tarfile.ReadError(f"no end mark at byte {end}")
            file.seek(end)
            while block := file.read(1 << 20):
                if block.count(0) < len(block):
                    raise tarfile.ReadError(f"no entry and no end mark at byte {end}, but more after it")
    except DataError:
        raise
    except Exception as error:  # on damaged files tarfile fails in any way, up to RecursionError and OverflowError
        raise DamagedError(
            f"--data-path: {path} is no tar file that images can be read from in place ({brief(error)}): a compressed "
            "one has to be repacked without compression, a damaged one fetched again"
        ) from error


def _tar_entry(path: str, entry: tarfile.TarInfo) -> TarEntry:
    name = _checked_name(path, entry.name)
    if entry.isreg() and entry.sparse is None:
        return TarEntry(name, "file", entry.offset_data, entry.size)
    if entry.islnk() or entry.issym():
        base = posixpath.dirname(name) if entry.issym() else ""
        return TarEntry(name, "link", 0, 0, _checked_name(path, posixpath.join(base, entry.linkname)))
    return TarEntry(name, "folder" if entry.isdir() else "other", 0, 0)


def _list_tar(path: str) -> tuple[dict[str, Place], set[str]]:
    """Files by name, and the names of the folders."""
    files, folders, links = {}, set(), {}
    for entry in tar_entries(path):
        if _is_of_macos(entry.name):
            continue
        if entry.kind == "folder":
            folders.add(entry.name)
        elif entry.kind == "file":
            files[entry.name] = (entry.start, entry.size, TAR, -1)
        else:
            links[entry.name] = entry.target
    for name, target in links.items():
        for _ in range(40):  # as many as Linux follows
            target = links.get(target, target)
        if target in files:
            files[name] = files[target]
        elif posixpath.splitext(name)[1].lower() in ("", *IMG_EXTENSIONS):  # an image or perhaps a class
            raise DataError(
                f"--data-path: {path} holds {shown(name)} only as a link to {shown(target) or 'a special file'}, "
                "which is not in it: pack the images themselves (tar --dereference)"
            )
    return files, folders


def _list_zip(path: str) -> tuple[dict[str, Place], set[str]]:
    """As :func:`_list_tar`."""
    files, folders = {}, set()
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            entries, length = archive.infolist(), file.length
    except Exception as error:  # on damaged files zipfile fails in any way, up to NotImplementedError
        raise DamagedError(
            f"--data-path: {path} is no zip file ({brief(error)}), or is cut short or damaged: fetch it again"
        ) from error
    for entry in entries:
        name = _checked_name(path, entry.filename)
        if _is_of_macos(name):
            continue
        if entry.filename.endswith("/"):  # is_dir fails on an empty name
            folders.add(name)
        else:
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"--data-path: {path} holds {shown(name)} encrypted or compressed in a way that cannot be read in "
                    "place: repack it with zip -0"
                )
            if entry.header_offset < 0 or entry.header_offset + LOCAL_HEADER + entry.compress_size > length:
                raise DamagedError(f"--data-path: {path} ends before {shown(name)} does: it is damaged, fetch it again")
            files[name] = (entry.header_offset, entry.compress_size, entry.compress_type, entry.CRC)
    return files, folders


def _checked_name(path: str, name: str) -> str:
    """Name without ``./`` and without leading or trailing slashes; the top is ''."""
    try:
        too_long = len(os.fsencode(name)) > MAX_NAME
    except UnicodeError as error:
        raise DamagedError(f"--data-path: {path} holds a name in no known encoding: pack it again") from error
    if too_long or "\0" in name or name.count("/") > MAX_DEPTH:
        raise DamagedError(
            f"--data-path: {path} holds a name of {len(name)} characters ({ascii(name[:40])}...), the limits are "
            f"{MAX_NAME} bytes and {MAX_DEPTH} folders: it is damaged, or has to be packed again"
        )
    name = posixpath.normpath(name).lstrip("/")
    return "" if name == "." else name


def _is_of_macos(name: str) -> bool:
    """Whether an entry is what a Mac's tar and zip put beside the files."""
    return name.startswith("__MACOSX") or posixpath.basename(name).startswith("._")
