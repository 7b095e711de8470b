"""Damaged tar and zip files and shard indices: a ``DataError``, or images that are read or named; nothing else."""

import io
import json
import os
import random
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzzing import CASES, EXTREMES, SCALE, damage, in_time, watched

from readers import archives, shards
from readers.archives import DataError

IMAGES = {
    f"{split}/{folder}/{name}.jpg": f"{split} {folder} {name}".encode() * 5
    for split in ("train", "val")
    for folder in ("cat", "dog")
    for name in ("1", "2" * 120, "\u00fc")
}


def make_tar(form: int) -> bytes:
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers={"comment": "x"}) as archive:
            for name, content in IMAGES.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            link = tarfile.TarInfo("train/cat/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "../dog/1.jpg"
            archive.addfile(link)
        return buffer.getvalue()


def make_zip(method: int) -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, content in IMAGES.items():
                archive.writestr(name, content)
        return buffer.getvalue()


def with_checksums(content: bytes) -> bytes:
    """A tar whose damaged headers have right checksums: what an attacker sends, and what gets past the first look."""
    data = bytearray(content)
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def spoil_tar(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.5:
        return with_checksums(damage(rng, content))
    data = bytearray(content)
    for _ in range(rng.randint(1, 2)):  # the size, in octal or binary, and the kind of an entry
        start = rng.choice([s for s in range(0, len(data), 512) if data[s + 257 : s + 262] == b"ustar"])
        number = rng.choice((*EXTREMES, -1, -512, -(2**40), 2**80))
        sizes = (b"%011o\0" % abs(number))[-12:], b"\xff" * 12, number.to_bytes(12, "big", signed=True)
        field = rng.choice(sizes[:2] if abs(number) >= 2**63 else sizes)
        data[start + 124 : start + 136] = (b"\x80" + field[1:]) if rng.random() < 0.3 else field
        if rng.random() < 0.5:
            data[start + 156] = rng.choice(b"01235LKxgSD")
    return with_checksums(bytes(data))


def spoil_zip(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    if rng.random() < 0.5:
        return damage(rng, content)
    for _ in range(rng.randint(1, 3)):  # a field of the directory or of its end
        start = rng.choice([i for i in range(len(data)) if data[i : i + 4] in (b"PK\1\2", b"PK\5\6")])
        width = rng.choice((1, 2, 4))
        number = rng.choice(EXTREMES) & (2 ** (8 * width) - 1)
        place = start + rng.randrange(4, 46)
        data[place : place + width] = number.to_bytes(width, "little")
    return bytes(data)


def read_all(path: Path) -> list[tuple[str, int, bytes | None]]:
    """(name, label, content) of what an archive is said to hold; None for what cannot be read."""
    archives._read_trees.cache_clear()
    found = []
    for split in ("train", "val"):
        tree = archives.read_tree(path, split, alone=False)
        for member, label in tree.members if tree else ():
            assert 0 <= label < len(tree.classes)
            try:
                found.append((member.name, label, member.read()))
            except (OSError, zlib.error):  # a bad image, see open_image
                found.append((member.name, label, None))
    return found


def outcome(path: Path, must_be_whole: bool) -> bool:
    """Whether an archive is accepted; if not, by one sentence. ``must_be_whole``: what is read is what was packed."""
    try:
        found = read_all(path)
    except DataError as error:
        text = str(error)
        assert path.name in text and "\n" not in text and len(text) < 1000, text
        return False
    if must_be_whole:
        assert {content for _, _, content in found} <= {*IMAGES.values(), None, b""}  # an empty file is no image
    return True


SOURCES = {
    "gnu": (make_tar(tarfile.GNU_FORMAT), spoil_tar, ".tar"),
    "pax": (make_tar(tarfile.PAX_FORMAT), spoil_tar, ".tar"),
    "stored": (make_zip(zipfile.ZIP_STORED), spoil_zip, ".zip"),
    "deflated": (make_zip(zipfile.ZIP_DEFLATED), spoil_zip, ".zip"),
}


@pytest.mark.parametrize("kind", list(SOURCES))
def test_damaged_archives(kind: str, tmp_path: Path) -> None:
    """A zip's images have CRCs: not one flipped bit of them is taken."""
    content, spoil, suffix = SOURCES[kind]
    rng, outcomes, path = random.Random(SCALE), [], tmp_path / f"images{suffix}"
    path.write_bytes(content)
    assert len(read_all(path)) == len(IMAGES) + (suffix == ".tar")
    with watched():
        for case in range(CASES):
            archives.close(str(path))
            path.unlink()
            path.write_bytes(spoil(rng, content))
            with in_time(case):
                outcomes.append(outcome(path, suffix == ".zip"))
    assert 0.05 < np.mean(outcomes) < 0.9


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_no_lost_entry_of_a_tar_goes_unnoticed(kind: str, tmp_path: Path) -> None:
    content, _, _ = SOURCES[kind]
    path = tmp_path / "images.tar"
    end = len(content.rstrip(b"\0"))
    headers = [start for start in range(0, len(content), 512) if content[start + 257 : start + 262] == b"ustar"]
    headers.pop()  # of the link: without content, its loss looks like the end
    spoiled = [content[:start] + bytes(512) + content[start + 512 :] for start in headers]
    spoiled += [content[:length] for length in range(1, end, 97)]
    for number, damaged in enumerate(spoiled):
        path.unlink(missing_ok=True)
        path.write_bytes(damaged)
        with in_time(number), pytest.raises(DataError, match="images.tar"):
            read_all(path)


# ---- single attacks ----


def tar_of(*entries: tuple[bytes, bytes, bytes]) -> bytes:
    """(name, type, content) of each; what is behind a header may be anything."""
    blocks = b""
    for name, kind, content in entries:
        entry = tarfile.TarInfo("x")
        entry.size = len(content)
        header = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
        header[:100], header[156:157] = name[:100].ljust(100, b"\0"), kind
        blocks += bytes(header) + content + bytes(-len(content) % 512)
    return with_checksums(blocks + bytes(1024))


def nested_long_names(kind: bytes) -> bytes:
    return tar_of(*[(b"././@LongLink", kind, b"a\0")] * 5000, (b"train/cat/1.jpg", b"0", b"x"))


TARS = {
    "long names in long names": nested_long_names(b"L"),
    "records in records": tar_of(*[(b"x", b"x", b"9 path=x\n")] * 5000, (b"train/cat/1.jpg", b"0", b"x")),
    "a name of 60 kB": tar_of((b"././@LongLink", b"L", b"train/cat/" + b"a" * 60_000 + b".jpg\0"), (b"x", b"0", b"x")),
    "500 folders": tar_of((b"././@LongLink", b"L", b"train/cat/" + b"a/" * 500 + b"x.jpg\0"), (b"x", b"0", b"x")),
    "many records for all": tar_of(
        *[(b"x", b"g", b"".join(b"%d k%05d=x\n" % (12, i) for i in range(n, n + 100))) for n in range(0, 2000, 100)],
        (b"train/cat/1.jpg", b"0", b"x"),
    ),
    "a broken record": tar_of((b"x", b"x", b"99999 path=x\n"), (b"train/cat/1.jpg", b"0", b"x")),
    "a size that is no number": tar_of((b"x", b"x", b"10 size=-\n"), (b"train/cat/1.jpg", b"0", b"x")),
    "a negative size": tar_of((b"x", b"x", b"12 size=-99\n"), (b"train/cat/1.jpg", b"0", b"x")),
    "two archives in one file": make_tar(tarfile.GNU_FORMAT) * 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", list(TARS))
def test_hostile_tars_are_explained(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    path.write_bytes(TARS[kind])
    with watched(), in_time(kind), pytest.raises(DataError, match="images.tar"):
        read_all(path)


def test_an_image_that_unpacks_to_gigabytes_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILE", 1 << 20)
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/cat/1.jpg", bytes(30 << 20))
        archive.writestr("val/cat/1.jpg", b"x")
    assert path.stat().st_size < 1 << 20
    tree = archives.read_tree(path, "train", alone=False)
    with watched(20), pytest.raises(OSError, match="unpacks to more than 1 MB"):
        tree.members[0][0].read()


def test_a_flipped_bit_in_a_zip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    path.write_bytes(make_zip(zipfile.ZIP_STORED).replace(b"train cat 1", b"train cat 2", 1))
    contents = [content for _, _, content in read_all(path)]
    assert contents.count(None) == 1 and len(contents) == len(IMAGES)


# ---- the index of shards ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two shards, as ``prepare_wds.py`` leaves it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    rows = []
    for number in range(2):
        path = folder / f"train-{number:06d}.tar"
        with tarfile.open(path, "w") as archive:
            for image in range(3):
                for ending, content in ((".jpg", b"image" * 9), (".cls", str(image).encode())):
                    entry = tarfile.TarInfo(f"{number}{image}{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        rows += [(*row[:-1], os.fsdecode(row[-1])) for row in shards.scan_shard(str(path), number).tolist()]
    np.save(folder / "train.npy", archives.make_table(rows))
    info = {
        "classes": ["a", "b", "c"],
        "splits": {"train": {"filenames": [p.name for p in sorted(folder.glob("*.tar"))], "shard_lengths": [3, 3]}},
    }
    (folder / "_info.json").write_text(json.dumps(info))
    return folder


def index_outcome(folder: Path) -> bool:
    shards.read_info.cache_clear()
    try:
        split = shards.open_split(str(folder), "train")
        members = shards.local_members(split)
        shards.class_names(str(folder))
    except DataError as error:
        assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < 2000
        return False
    assert len(members) == sum(split.lengths) == 6
    for member, label in members:
        assert 0 <= label < max(3, len(split.classes))
        try:
            assert member.read() == b"image" * 9
        except OSError:
            pass
    return True


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # of numpy's parser
@pytest.mark.parametrize("name", ["_info.json", "train.npy"])
def test_damaged_indices_of_shards(name: str, folder: Path) -> None:
    rng, outcomes = random.Random(SCALE), []
    path = folder / name
    content = path.read_bytes()
    assert index_outcome(folder)
    with watched():
        for case in range(CASES):
            path.write_bytes(damage(rng, content))
            with in_time(case):
                outcomes.append(index_outcome(folder))
    assert 0.01 < np.mean(outcomes) < 0.9


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 5},
        {"classes": [1, 2, 3]},
        {"splits": []},
        {"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": [10**18]}}},
        {"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": [True]}}},
        {"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": [-1]}}},
        {"splits": {"train": {"filenames": "a", "shard_lengths": [1]}}},
    ],
)
def test_an_index_of_impossible_numbers_is_explained(change: dict, folder: Path) -> None:
    path = folder / "_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert not index_outcome(folder)


def npy(shape: str, kinds: str) -> bytes:
    header = f"{{'descr': {kinds}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(100)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        npy("(10**12,)", "'<i8'"),
        npy("(1000000000000,)", "'<i8'"),
        npy("(1,)", "'|S2000000000'"),
        npy("(1,)", "'|O'"),
        npy("(1,)", str([*((name, f"<{kind}") for name, kind in archives.KINDS.items()), ("name", "|S9999999")])),
        npy("(1000000000000,)", str([*((n, f"<{k}") for n, k in archives.KINDS.items()), ("name", "|S3")])),
    ],
)
def test_a_hostile_table_is_explained(content: bytes, folder: Path) -> None:
    (folder / "train.npy").write_bytes(content)
    with watched(), pytest.raises(DataError, match="train.npy is missing or damaged .*prepare_wds.py --index"):
        shards.local_members(shards.open_split(str(folder), "train"))


@pytest.mark.parametrize("label", [b"99999999999", b"-1", b"1_0", b"", b"x" * 50, "\u0663".encode(), b"1" * 4000])
def test_a_label_that_is_no_class_is_explained(label: bytes, folder: Path) -> None:
    path = folder / "train-000000.tar"
    path.write_bytes(tar_of((b"00.jpg", b"0", b"image"), (b"00.cls", b"0", label)))
    with pytest.raises(DataError, match="00 lacks its .jpg, or a .cls with the number of its class"):
        shards.scan_shard(str(path))


@pytest.mark.parametrize("name", ["_info.json", "train.npy", "train-000000.tar"])
def test_a_fifo_in_place_of_a_file_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    shards.read_info.cache_clear()
    with in_time(name), pytest.raises(DataError, match=name.replace(".", r"\.")):
        shards.local_members(shards.open_split(str(folder), "train"))
    with in_time(name), pytest.raises(DataError):
        shards.scan_shard(str(folder / name))
