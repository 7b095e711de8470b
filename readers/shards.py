"""WebDataset shards, ``--data-set wds``: tar files of ``<key>.jpg`` and ``<key>.cls`` with an index beside them.

``scripts/prepare_wds.py`` writes a folder of ``train-*.tar`` and ``val-*.tar``; its ``_info.json`` (in timm's form)
names the shards, their sample counts and the classes; ``train.npy`` and ``val.npy`` give the place of each image.
A local folder is read in place, in the order of the keys: to the rest of the program it is a tree of images.

A remote one (``https://``, ``gs://``, ``hf://`` or ``pipe:``, whatever ``webdataset.gopen`` opens) is read
shard after shard. Whole shards are fetched, some ahead of need, into a cache that the processes of a machine share; the
oldest are removed to make room. ``samplers.ShardSampler`` draws an order that asks for shards in turn. webdataset is
imported only to open an address or to index a shard.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import queue
import re
import secrets
import shlex
import shutil
import stat
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from . import archives
from .archives import DamagedError, DataError, Member, Members, brief, shown
from .files import MAX_FILE, open_file, read_file

_logger = logging.getLogger(__name__)

INFO_NAMES = ("_info.json", "info.json")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation")}
# After pipe: a shard's name becomes part of a shell command, so it may hold no character that is special to a shell.
SHARD_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
ATTEMPTS, PAUSE_S = 8, 1.0  # of fetching a shard; pauses double: two minutes in all
FETCHERS = 4  # threads of a process that fetch ahead
DISK_SHARE = 0.9  # of the disk space that is free or held by the cache: the cache never takes more
FOLDER = "shards-"  # begins the names of the cache's folders, so that nothing else in --shard-cache is touched
MAX_INDEX = 64 << 20  # bytes of _info.json
MAX_TABLE = 4 << 30  # bytes of train.npy
MAX_IMAGES = 10**8  # of a split: their order is drawn in memory
MAX_LABEL_DIGITS = 9
PART_DIGITS = 8  # tell the parts of several downloads of one shard apart


class Shards(NamedTuple):
    """One split of a set of shards: where it is, its shards and classes, and the digest of ``_info.json``."""

    root: str
    split: str
    names: list[str]
    lengths: list[int]
    classes: list[str]
    digest: str

    def url(self, shard: int) -> str:
        """Where a shard is: a path or whatever ``gopen`` opens."""
        return join(self.root, self.names[shard])


def is_remote(root: str) -> bool:
    """Whether shards have to be fetched from there."""
    return root.startswith("pipe:") or "://" in root


def join(root: str, name: str) -> str:
    """Address of a file of the data set; in a command after ``pipe:`` its name replaces ``{}``."""
    return root.replace("{}", name) if root.startswith("pipe:") else f"{root.rstrip('/')}/{name}"


@lru_cache(maxsize=8)  # one look for the classes, the training and the evaluation images
def read_info(root: str) -> tuple[dict[str, Any], str]:
    """The content of ``_info.json`` and its digest.

    Raises:
        DataError: If it is missing or not such a file.
    """
    if root.startswith("pipe:") and "{}" not in root:
        raise DataError(f"--data-path {root!r}: put {{}} where the command takes a file's name")
    if is_remote(root):
        _check_scheme(root)
        _logger.info(f"reading the index of the shards at {root}")
    problems = []
    for name in INFO_NAMES:
        try:
            content = _read(join(root, name))
            info = json.loads(content)
            _check_info(info)
            return info, hashlib.sha256(content).hexdigest()[:16]
        except OSError as error:
            problems.append(f"{name}: {_reason(error)}")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"--data-path {root}: {name} is no index of shards ({brief(error)}): write it anew"
            ) from error
    raise DataError(
        f"--data-path {root} has no readable index of shards ({'; '.join(problems)}): scripts/prepare_wds.py writes "
        "shards with their index, with --index an index for shards that are there"
    )


def _check_scheme(root: str) -> None:
    from webdataset.gopen import gopen_schemes

    scheme = root.partition(":")[0]
    if scheme not in gopen_schemes:
        known = ", ".join(sorted(name for name in gopen_schemes if name not in ("pipe", "__default__")))
        raise DataError(
            f"--data-path {root}: {scheme}:// cannot be opened, only {known}, and what a command writes: "
            "'pipe:aws s3 cp s3://bucket/{} -'"
        )


def _check_info(info: Any) -> None:
    """Raises ValueError if it does not have the fields and types that the rest of this file expects."""

    def is_list(value: Any, kind: type) -> bool:
        return isinstance(value, list) and all(type(entry) is kind for entry in value)

    if not isinstance(info, dict) or not isinstance(info.get("splits"), dict):
        raise ValueError('no "splits" by name')
    if not is_list(info.get("classes") or [], str):
        raise ValueError('its "classes" are no list of names')
    for split in info["splits"].values():
        if not isinstance(split, dict) or not is_list(split.get("filenames"), str):
            raise ValueError("filenames are no list of names")
        lengths = split.get("shard_lengths")
        if not is_list(lengths, int) or not all(length >= 0 for length in lengths):
            raise ValueError("shard_lengths are no numbers of images")
        if len(split["filenames"]) != len(lengths):
            raise ValueError("filenames and shard_lengths differ in number")
        if sum(lengths) > MAX_IMAGES:
            raise ValueError(f"shard_lengths add up to more than {MAX_IMAGES} images")


def _reason(error: OSError) -> str:
    """What went wrong, without the command line in ``gopen``'s message."""
    code = re.search(r"exit (-?\d+)", str(error))
    return error.strerror or (f"the command that reads it ended with code {code[1]}" if code else str(error))


def _open(url: str) -> IO:
    """A stream of a remote file. Unlike ``gopen``'s, one over ``http(s)://`` ends if nothing comes for a minute."""
    from webdataset.gopen import gopen

    if url.startswith(("http://", "https://")):
        command = "curl -sfLg --connect-timeout 30 --retry 5 --retry-delay 2 --speed-limit 1 --speed-time 60"
        url = f"pipe:{command} {shlex.quote(url)}"
    _let_forks_wait()
    with _starting:
        return gopen(url, "rb")


# Held while a command is started. A process forked at that moment would inherit the writing end of the command's pipe.
# The reader would then never see the end of the stream and wait for ever, and so would others that want the shard.
_starting = threading.Lock()


@lru_cache
def _let_forks_wait() -> None:
    os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


def _read(url: str) -> bytes:
    if not is_remote(url):
        return read_file(url, MAX_INDEX)
    with _open(url) as stream:
        content = stream.read(MAX_INDEX + 1)
    if len(content) > MAX_INDEX:
        raise ValueError(f"it is larger than {MAX_INDEX >> 20} MB")
    return content


def open_split(root: str, split: str) -> Shards:
    """The shards of "train" or "val".

    Raises:
        DataError: If the index lacks that split or its classes, or has a name that no shard can have.
    """
    info, digest = read_info(root)
    found = next((info["splits"][name] for name in SPLIT_NAMES[split] if name in info["splits"]), None)
    if found is None:
        raise DataError(f"--data-path {root}: the index has no split {split}, only {shown(', '.join(info['splits']))}")
    names, lengths = found["filenames"], found["shard_lengths"]
    bad = next((name for name in names if not SHARD_NAME.fullmatch(name)), None)
    if bad is not None:
        raise DataError(
            f"--data-path {root}: the index names a shard {bad!r}: letters, digits, . _ - and / are allowed"
        )
    if not sum(lengths):
        raise DataError(f"--data-path {root}: the index lists no images of {split}")
    return Shards(root, split, names, lengths, info.get("classes") or [], digest)


def class_names(root: str) -> list[str]:
    """Class names in label order.

    Raises:
        DataError: If the index has none.
    """
    classes = read_info(root)[0].get("classes")
    if not classes:
        raise DataError(f'--data-path {root}: the index names no "classes": give --num-classes')
    return classes


def scan_shard(path: str, number: int = 0) -> np.ndarray:
    """Table (``archives.make_table``) of the samples of a shard in their order; ``number`` is its first column.

    Raises:
        DataError: If it is no shard: a sample lacks its image or its class.
    """
    from webdataset.tariterators import base_plus_ext

    samples: dict[str, dict[str, archives.TarEntry]] = {}
    for entry in archives.tar_entries(path):
        key, extension = base_plus_ext(entry.name)
        if entry.kind == "file" and key is not None:
            samples.setdefault(key, {})["." + extension.lower()] = entry
    rows = []
    with os.fdopen(open_file(path), "rb") as file:
        for key, parts in samples.items():
            image = next((entry for extension, entry in parts.items() if extension in IMG_EXTENSIONS), None)
            label = parts.get(".cls")
            digits = b""
            if label is not None and label.size < 100:
                file.seek(label.start)
                digits = file.read(label.size).strip()
            if image is None or not digits.isdigit() or len(digits) > MAX_LABEL_DIGITS or image.size > MAX_FILE:
                raise DataError(
                    f"--data-path: {path} is no shard of labelled images: {shown(key)} lacks its .jpg, or a .cls with "
                    "the number of its class"
                )
            file.seek(image.start)
            crc = zlib.crc32(file.read(image.size))
            rows.append((number, image.start, image.size, archives.TAR, crc, int(digits), image.name))
    return archives.make_table(rows)


def local_members(shards: Shards) -> Members:
    """Images of local shards in the order of their keys, after a check of every shard's size.

    Raises:
        DataError: If the index of the images is missing, or shards are missing, cut short or not those of the index.
    """
    path = Path(shards.root, f"{shards.split}.npy")
    try:
        table = archives.load_table(read_file(path, MAX_TABLE))
        ends = np.zeros(len(shards.names), np.int64)
        np.maximum.at(ends, table["archive"], table["start"] + table["size"])
        counts = np.bincount(table["archive"], minlength=len(ends)).tolist()
    except (OSError, ValueError, IndexError) as error:
        raise DataError(
            f"--data-path {shards.root}: {path.name} is missing or damaged ({error}): "
            f"python scripts/prepare_wds.py --index {shards.root}"
        ) from error
    if counts != shards.lengths:
        raise DataError(
            f"--data-path {shards.root}: {path.name} and the index of shards differ in their numbers of images: "
            f"python scripts/prepare_wds.py --index {shards.root}"
        )
    paths = [shards.url(shard) for shard in range(len(ends))]
    for where, end in zip(paths, ends.tolist(), strict=True):
        size = os.path.getsize(where) if os.path.isfile(where) else 0
        if size < end:
            raise DataError(f"--data-path: shard {where} is {'cut short' if size else 'missing'}: fetch it again")
    _check_labels(shards, table["label"])
    return Members(paths, table)


def _check_labels(shards: Shards, labels: np.ndarray) -> None:
    if shards.classes and labels.max(initial=0) >= len(shards.classes):
        raise DataError(
            f"--data-path {shards.root}: a label of {shards.split} is {labels.max()}, but the index names "
            f'{len(shards.classes)} "classes": they do not belong together'
        )


class RemoteMembers(Sequence):
    """(:class:`Member`, label) of the images of remote shards, shard after shard, fetched when asked for.

    Args:
        shards: The shards of one split.
        folder: The cache; made if needed. Processes of one or several runs may share it.
        limit: Bytes that it may hold; the shards that were asked for longest ago make room.

    Raises:
        DataError: From ``[]``, if a shard cannot be fetched or is not what the index says.
    """

    def __init__(self, shards: Shards, folder: Path, limit: float) -> None:
        self.shards, self.base, self.limit = shards, folder, limit
        # Another index is another data set, even at the same address.
        name = hashlib.sha256(f"{shards.root}\n{shards.digest}\n{os.geteuid()}".encode()).hexdigest()[:16]
        self.folder = folder / f"{FOLDER}{name}"
        self.ends = list(accumulate(shards.lengths))
        self._tables: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.ends[-1]

    def shard_of(self, index: int) -> int:
        """Number of the shard that holds an image."""
        return bisect_right(self.ends, index)

    def __getitem__(self, index: int) -> tuple[Member, int]:
        shard = self.shard_of(index)
        for attempt in range(3):
            try:
                self._open(shard)
                members = Members([str(self.path(shard))], self._tables[shard])
                member, label = members[index - self.ends[shard] + self.shards.lengths[shard]]
                member.read()
                return member._replace(crc=-1), label  # read() has just checked it
            except (DataError, FileNotFoundError, NotADirectoryError) as error:
                if isinstance(error, DataError):
                    raise
            except (OSError, ValueError) as error:
                _logger.warning(f"--shard-cache: {self.path(shard)} is damaged ({brief(error)}): fetching it again")
                self._drop(shard)
            if attempt < 2:
                self.fetch(shard, keep_open=True)
        raise DataError(f"--shard-cache {self.base}: what is written there is not what is read: check that disk")

    def _open(self, shard: int) -> None:
        """Opens a shard of the cache and keeps it open, so that a read succeeds even if it is removed meanwhile.

        Raises:
            OSError: If it or its table is not there.
            ValueError: If they are damaged.
            DataError: If others can write there.
        """
        path = self.path(shard)
        self._check_folder()
        archives.descriptor(str(path), os.O_NOFOLLOW)
        if shard not in self._tables:
            table = archives.load_table(read_file(path.with_suffix(".npy"), MAX_TABLE, os.O_NOFOLLOW))
            if len(table) != self.shards.lengths[shard]:
                raise ValueError("its table is of another shard")
            if len(self._tables) >= archives.MAX_OPEN_FILES:
                self._tables.pop(next(iter(self._tables)))
            self._tables[shard] = table

    def _drop(self, shard: int) -> None:
        """Removes a damaged shard from the cache."""
        path = self.path(shard)
        archives.close(str(path))
        self._tables.pop(shard, None)
        for file in (path, path.with_suffix(".npy")):
            with suppress(OSError):
                file.unlink()

    def path(self, shard: int) -> Path:
        """Where the cache keeps a shard; its table lies beside it."""
        return self.folder / f"{quote(self.shards.names[shard].removesuffix('.tar'), safe='')}.tar"

    def fetch(self, shard: int, keep_open: bool = False) -> None:
        """Makes sure that the cache has a shard and its table; of several processes that want it, one fetches.

        Args:
            shard: Its number.
            keep_open: Whether this process is to read from it.

        Raises:
            DataError: If it cannot be fetched, or the cache cannot hold it.
        """
        path = self.path(shard)
        for _ in range(3):  # somebody may remove the cache meanwhile
            try:
                self._claim_folder()
                with _locked(path):
                    if not (path.exists() and path.with_suffix(".npy").exists()):
                        self._fetch(shard, path)
                    os.utime(path)
                    if keep_open:
                        with suppress(ValueError):  # it is damaged, which the caller notices
                            self._open(shard)
                return
            except FileNotFoundError as error:
                failure: OSError = error
            except OSError as error:
                failure = error
                break
        raise DataError(
            f"--shard-cache {self.base} cannot take a shard ({failure.strerror or failure}): free some space there, "
            "name another folder, or lower --shard-cache-gb"
        ) from failure

    def _fetch(self, shard: int, path: Path) -> None:
        """Downloads a shard, checks every image and gives the files their names; a failure leaves no partial file."""
        part, table = (
            path.with_name(f"{path.stem}.{secrets.token_hex(PART_DIGITS // 2)}{ending}.part") for ending in ("", ".npy")
        )
        try:
            rows = self._download(shard, part)
            with open(table, "xb") as file:
                np.save(file, rows)
                _to_disk(file)
            table.replace(path.with_suffix(".npy"))
            part.replace(path)
            archives.close(str(path))
            self._tables.pop(shard, None)
        finally:
            part.unlink(missing_ok=True)
            table.unlink(missing_ok=True)
        self._make_room(keep=path)

    def _claim_folder(self) -> None:
        self.base.mkdir(mode=0o755, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        self._check_folder()

    def _check_folder(self) -> None:
        """Refuses a folder that other users could write into or replace.

        Raises:
            FileNotFoundError: If it is not there.
            DataError: If it is somebody else's, or others can write into it.
        """
        state, above = self.folder.lstat(), self.base.stat()
        others_write = stat.S_IWGRP | stat.S_IWOTH
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & others_write:
            raise DataError(
                f"--shard-cache: {self.folder} is a link, belongs to somebody else or can be written by others, who "
                "could put images there: remove it, or name another folder"
            )
        if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
            raise DataError(f"--shard-cache {self.base} can be written by everybody (chmod o-w): name another folder")

    def _download(self, shard: int, part: Path) -> np.ndarray:
        """Fetches a shard into ``part`` and returns its table; tries again if it breaks off or is not a tar."""
        url, room = self.shards.url(shard), DISK_SHARE * shutil.disk_usage(self.base).free
        for attempt in range(ATTEMPTS):
            try:
                with _open(url) as stream, open(part, "wb") as file:
                    while block := stream.read(2**20):
                        file.write(block)
                        if file.tell() > room:
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    _to_disk(file)
                return self._scan(part, shard)
            except DamagedError as error:
                with open(part, "rb") as file:
                    page = file.read(100).lstrip().startswith(b"<")
                reason = "a web page came" if page else f"no whole tar came, {brief(error.__cause__ or error)}"
                cause: Exception = error
            except FileNotFoundError as error:
                if not part.parent.exists():  # the cache was removed
                    raise
                reason, cause = _reason(error), error
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise
                reason, cause = _reason(error), error
            if attempt < ATTEMPTS - 1:
                time.sleep(PAUSE_S * 2**attempt)
        raise DataError(
            f"--data-path: {url} could not be fetched in {ATTEMPTS} attempts ({reason}): look at the address and the "
            "network; the same command with --auto_reload continues"
        ) from cause

    def _scan(self, part: Path, shard: int) -> np.ndarray:
        try:
            table = scan_shard(str(part))
        except DamagedError:
            raise
        except DataError as error:
            raise DataError(str(error).replace(str(part), self.shards.url(shard))) from error
        if len(table) != self.shards.lengths[shard]:
            raise DataError(
                f"--data-path: {self.shards.url(shard)} holds {len(table)} images, the index says "
                f"{self.shards.lengths[shard]}: write the index anew"
            )
        _check_labels(self.shards, table["label"])
        return table

    def _make_room(self, keep: Path) -> None:
        """Removes the shards that were asked for longest ago until the cache is within its limit and the disk's.

        Parts of downloads that were killed go first. Nothing but this cache's own folders is looked at.
        """
        found = []
        for file in [*self.base.glob(f"{FOLDER}*/*.tar"), *self.base.glob(f"{FOLDER}*/*.part")]:
            with suppress(FileNotFoundError):  # another process removes it
                state = file.stat()
                found.append((file.suffix != ".part", state.st_mtime_ns, state.st_size, file))
        held = sum(size for _, _, size, _ in found)
        limit = min(self.limit, DISK_SHARE * (held + shutil.disk_usage(self.base).free))
        for whole, _, size, file in sorted(found):
            if (whole and held <= limit) or file == keep:
                continue
            stem = file.name.removesuffix(".part").removesuffix(".npy")[: -1 - PART_DIGITS]
            shard = file if whole else file.with_name(f"{stem}.tar")
            with suppress(BlockingIOError):  # a process is just opening it, or fetching
                with _locked(shard, wait=False):
                    file.unlink(missing_ok=True)
                    if whole:
                        file.with_suffix(".npy").unlink(missing_ok=True)
                    held -= size


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a shard of the cache, against other threads and processes that ask for it.

    Raises:
        BlockingIOError: Without ``wait``, if another holds it.
    """
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            # Closing is not enough: a process that was forked meanwhile has the file open too.
            fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def default_cache() -> Path:
    """Where shards are kept without ``--shard-cache``: in this user's own cache folder, by the XDG convention."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()) / "vit-anti-oversmoothing" / "shards"


def _to_disk(file: IO) -> None:
    """Waits until a file is written: the cache outlives a crash of the machine."""
    file.flush()
    os.fsync(file.fileno())


class FetchAhead:
    """Threads that fetch the shards they are told of, for as long as the context lasts.

    Errors are left to the process that needs the shard: it tries again and reports them.
    """

    def __init__(self, members: RemoteMembers) -> None:
        self.members = members
        self.wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.asked: set[int] = set()
        self.over = False

    def __enter__(self) -> "FetchAhead":
        for _ in range(FETCHERS):  # daemons: a run that is asked to stop does not wait for a download
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over = True
        for _ in range(FETCHERS):  # wakes the threads
            self.wanted.put(0)

    def ask(self, index: int) -> None:
        """Says that an image will be needed soon."""
        shard = self.members.shard_of(index)
        if shard not in self.asked:
            self.asked.add(shard)
            self.wanted.put(shard)

    def _work(self) -> None:
        while True:
            shard = self.wanted.get()
            if self.over:
                return
            try:
                self.members.fetch(shard)
            except DataError:
                pass
