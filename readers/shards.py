"""WebDataset shards, ``--data-set wds``: tar files of ``<key>.jpg`` and ``<key>.cls`` with an index beside them.

``scripts/prepare_wds.py`` writes a folder of ``train-*.tar`` and ``val-*.tar``; its ``_info.json`` (in timm's form)
names shards, numbers of samples and classes, and ``train.npy`` and ``val.npy`` say where in which shard each image is.
A local folder is read in place, in the order of the keys: to the rest of the program it is a tree of images.

A remote one (``https://``, ``gs://``, ``hf://`` or ``pipe:``, whatever ``webdataset.gopen`` opens) is read
shard after shard: whole shards are fetched into a cache that the processes of a machine share, some ahead of need, and
the oldest make room. ``samplers.ShardSampler`` draws an order that asks for them in turn. webdataset is imported only
to open an address or to index a shard.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from . import archives
from .archives import DataError, Member, Members

_logger = logging.getLogger(__name__)

INFO_NAMES = ("_info.json", "info.json")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation")}
# A shard's name becomes part of a shell's command after pipe:, so it may hold nothing that a shell understands.
SHARD_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
ATTEMPTS, PAUSE_S = 8, 1.0  # of fetching a shard; pauses double: two minutes in all
FETCHERS = 4  # threads of a process that fetch ahead
DISK_SHARE = 0.9  # of what is free on the cache's disk or held by the cache: more is never taken


class Shards(NamedTuple):
    """One split of a set of shards: where it is, what it is made of, and the digest of the file that says so."""

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
    """Address of a file of the data set; a command after ``pipe:`` has ``{}`` in its place."""
    return root.replace("{}", name) if root.startswith("pipe:") else f"{root.rstrip('/')}/{name}"


@lru_cache(maxsize=8)  # one look for the classes, the training and the evaluation images
def read_info(root: str) -> tuple[dict[str, Any], str]:
    """The content of ``_info.json`` and its digest.

    Raises:
        DataError: If it is missing or no such file.
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
            for split in info["splits"].values():
                if len(split["filenames"]) != len(split["shard_lengths"]):
                    raise ValueError("filenames and shard_lengths differ in number")
                if not all(isinstance(length, int) and length >= 0 for length in split["shard_lengths"]):
                    raise ValueError("shard_lengths are no numbers of images")
            return info, hashlib.sha256(content).hexdigest()[:16]
        except OSError as error:
            problems.append(f"{name}: {_reason(error)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"--data-path {root}: {name} is no index of shards ({error!r}): write it anew") from error
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


def _reason(error: OSError) -> str:
    """What went wrong, without the command line that ``gopen`` says it with."""
    code = re.search(r"exit (-?\d+)", str(error))
    return error.strerror or (f"the command that reads it ended with code {code[1]}" if code else str(error))


def _read(url: str) -> bytes:
    if not is_remote(url):
        return Path(url).read_bytes()
    from webdataset.gopen import gopen

    with gopen(url, "rb") as stream:
        return stream.read()


def open_split(root: str, split: str) -> Shards:
    """The shards of "train" or "val".

    Raises:
        DataError: If the index lacks that split or its classes, or names files as no shard can be named.
    """
    info, digest = read_info(root)
    found = next((info["splits"][name] for name in SPLIT_NAMES[split] if name in info["splits"]), None)
    if found is None:
        raise DataError(f"--data-path {root}: the index has no split {split}, only {', '.join(info['splits'])}")
    names, lengths = [str(name) for name in found["filenames"]], found["shard_lengths"]
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
    with open(path, "rb") as file:
        for key, parts in samples.items():
            image = next((entry for extension, entry in parts.items() if extension in IMG_EXTENSIONS), None)
            try:
                file.seek(parts[".cls"].start)
                label = int(file.read(parts[".cls"].size))
            except (KeyError, ValueError):
                label = -1
            if image is None or label < 0:
                raise DataError(f"--data-path: {path} is no shard of labelled images: {key} lacks its .jpg or .cls")
            rows.append((number, image.start, image.size, archives.TAR, label, image.name))
    return archives.make_table(rows)


def local_members(shards: Shards) -> Members:
    """Images of local shards in the order of their keys, after a look at every shard's size.

    Raises:
        DataError: If the index of the images is missing, or shards are missing, cut short or not those of the index.
    """
    path = Path(shards.root, f"{shards.split}.npy")
    try:
        table = np.load(path, allow_pickle=False)
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
    """(:class:`Member`, label) of the images of remote shards, shard after shard; what is asked for is fetched.

    Args:
        shards: Of one split.
        folder: The cache; made if needed. Processes may share it, of one run or of several.
        limit: Bytes that it may hold; the shards that were asked for longest ago make room.

    Raises:
        DataError: From ``[]``, if a shard cannot be fetched or is not what the index says.
    """

    def __init__(self, shards: Shards, folder: Path, limit: float) -> None:
        self.shards, self.base, self.limit = shards, folder, limit
        # Another index means another data set, even at the same address.
        self.folder = folder / hashlib.sha256(f"{shards.root}\n{shards.digest}".encode()).hexdigest()[:16]
        self.ends = list(accumulate(shards.lengths))
        self._tables: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.ends[-1]

    def shard_of(self, index: int) -> int:
        """Number of the shard that holds an image."""
        return bisect_right(self.ends, index)

    def __getitem__(self, index: int) -> tuple[Member, int]:
        shard = self.shard_of(index)
        try:
            self._open(shard)
        except (FileNotFoundError, NotADirectoryError):
            self.fetch(shard, keep_open=True)
        members = Members([str(self.path(shard))], self._tables[shard])
        return members[index - self.ends[shard] + self.shards.lengths[shard]]

    def _open(self, shard: int) -> None:
        """Opens a shard of the cache, for good: the read that follows succeeds even if it is removed meanwhile."""
        archives.descriptor(str(self.path(shard)))
        if shard not in self._tables:
            if len(self._tables) >= archives.MAX_OPEN_FILES:
                self._tables.pop(next(iter(self._tables)))
            self._tables[shard] = np.load(self.path(shard).with_suffix(".npy"), allow_pickle=False)

    def path(self, shard: int) -> Path:
        """Where the cache keeps a shard; its table lies beside it."""
        return self.folder / f"{quote(self.shards.names[shard].removesuffix('.tar'), safe='')}.tar"

    def fetch(self, shard: int, keep_open: bool = False) -> None:
        """Lets a shard and its table be in the cache; of several processes that want it, one fetches.

        Args:
            shard: Its number.
            keep_open: Whether this process is to read from it.

        Raises:
            DataError: If it cannot be fetched, or the cache cannot hold it.
        """
        path = self.path(shard)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                if not path.exists():
                    partial = path.with_suffix(".part")
                    _download(self.shards.url(shard), partial)
                    with open(path.with_suffix(".npy"), "wb") as file:
                        np.save(file, self._scan(partial, shard))
                        _to_disk(file)
                    partial.replace(path)
                    self._make_room(keep=path)
                os.utime(path)
                if keep_open:
                    self._open(shard)
        except OSError as error:
            raise DataError(
                f"--shard-cache {self.base} cannot take a shard ({error.strerror or error}): free some space there, "
                "name another folder, or lower --shard-cache-gb"
            ) from error

    def _scan(self, path: Path, shard: int) -> np.ndarray:
        table = scan_shard(str(path))
        if len(table) != self.shards.lengths[shard]:
            raise DataError(
                f"--data-path: {self.shards.url(shard)} holds {len(table)} images, the index says "
                f"{self.shards.lengths[shard]}: write the index anew"
            )
        _check_labels(self.shards, table["label"])
        return table

    def _make_room(self, keep: Path) -> None:
        """Removes the shards that were asked for longest ago until the cache is within its limit and the disk's."""
        found = []
        for table in self.base.glob("*/*.npy"):
            path = table.with_suffix(".tar")
            try:
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:  # another process removes it
                pass
        held = sum(size for _, size, _ in found)
        limit = min(self.limit, DISK_SHARE * (held + shutil.disk_usage(self.base).free))
        for _, size, path in sorted(found):
            if held > limit and path != keep:
                try:
                    with _locked(path, wait=False):
                        path.unlink(missing_ok=True)
                        path.with_suffix(".npy").unlink(missing_ok=True)
                        held -= size
                except BlockingIOError:  # a process is just opening it
                    pass


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Keeps the other threads and processes that ask for it from a shard of the cache.

    Raises:
        BlockingIOError: Without ``wait``, if one has it.
    """
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            # Closing is not enough: a process that was forked meanwhile has the file open too.
            fcntl.flock(lock, fcntl.LOCK_UN)


def default_cache() -> Path:
    """Where shards are kept without ``--shard-cache``: in this user's part of the machine's temporary folder."""
    return Path(tempfile.gettempdir(), f"shards-{os.getuid()}")


def _to_disk(file: IO) -> None:
    """Waits until a file is written: the cache outlives a crash of the machine."""
    file.flush()
    os.fsync(file.fileno())


def _download(url: str, target: Path) -> None:
    from webdataset.gopen import gopen

    for attempt in range(ATTEMPTS):
        try:
            with gopen(url, "rb") as stream, open(target, "wb") as file:
                shutil.copyfileobj(stream, file, 2**20)
                _to_disk(file)
            return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            if attempt == ATTEMPTS - 1:
                raise DataError(
                    f"--data-path: {url} could not be fetched in {ATTEMPTS} attempts ({_reason(error)}): look at "
                    "the address and the network; the same command with --auto_reload continues"
                ) from error
        time.sleep(PAUSE_S * 2**attempt)


class FetchAhead:
    """Threads that fetch the shards they are told of, for as long as the context lasts.

    What goes wrong is left to the process that needs the shard, which tries again and says what it is.
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
