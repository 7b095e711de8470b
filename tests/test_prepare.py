"""The scripts that make data sets: the right files, once, and whole after an interruption."""

import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.imagenet import ARCHIVE_META

from scripts import prepare_digits, prepare_imagenet

WNIDS = ["n01440764", "n01443537", "n02084071"]


def tree_digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.*")):
        if path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("digits") / "data" / "digits"
    assert prepare_digits.prepare_digits(output)
    return output


def test_digits_are_split_by_class_and_disjoint(digits: Path) -> None:
    names = {split: [path.name for path in (digits / split).glob("*/*.png")] for split in ("train", "val")}
    assert len(names["train"]) == 1437
    assert len(names["val"]) == 360
    assert len(set(names["train"]) | set(names["val"])) == 1797
    assert [len(list((digits / "val" / str(digit)).iterdir())) for digit in range(10)] == [36] * 10
    with Image.open(next((digits / "val" / "7").iterdir())) as image:
        assert image.size == (32, 32)
        assert np.asarray(image).max() > 200


def test_digits_are_the_same_bytes_every_time(digits: Path, tmp_path: Path) -> None:
    prepare_digits.prepare_digits(tmp_path / "again")
    assert tree_digest(tmp_path / "again") == tree_digest(digits)


def test_parts_of_the_digits_share_no_training_image_and_all_test_images(tmp_path: Path) -> None:
    for part in ("1", "2"):
        prepare_digits.main(["--output", str(tmp_path / part), "--part", f"{part}/2"])
    first, second = ({p.name for p in (tmp_path / part / "train").glob("*/*.png")} for part in ("1", "2"))
    assert not first & second and len(first | second) == 1437 and abs(len(first) - len(second)) <= 10
    assert tree_digest(tmp_path / "1" / "val") == tree_digest(tmp_path / "2" / "val")
    for text in ("half", "0/2", "3/2"):
        with pytest.raises(SystemExit):
            prepare_digits.main(["--output", str(tmp_path / "3"), "--part", text])


def test_digits_are_written_once(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    prepare_digits.main(["--output", str(digits)])
    assert "already there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in digits.rglob("*")}


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_incomplete_digits_are_rebuilt(digits: Path, tmp_path: Path, damage: str) -> None:
    output = tmp_path / "digits"
    shutil.copytree(digits, output)
    victim = next((output / "train" / "3").iterdir())
    victim.unlink() if damage == "missing" else victim.write_bytes(b"")
    assert prepare_digits.prepare_digits(output)
    assert tree_digest(output) == tree_digest(digits)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_foreign_files_are_never_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert prepare_digits.main(["--output", str(tmp_path)]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_existing_empty_folder_is_used(tmp_path: Path) -> None:
    assert prepare_digits.prepare_digits(tmp_path)
    assert not prepare_digits.prepare_digits(tmp_path)


# ------------------------------------------------------------------------------------------------------------- ImageNet


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """ILSVRC 2012 in small: the nesting and names of the published archives, 3 classes, 5 + 7 images."""
    folder = tmp_path / "archives"
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, wnid in enumerate(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(5):
                    add_file(tar, f"{wnid}_{i}.JPEG", jpeg(10 * number + i))
            add_file(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in reversed(range(7)):  # labels go by name, not by place in the archive
            add_file(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(100 + i))

    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = [(i + 1, wnid, f"fish {i}, swimmer", "a fish", 0, np.zeros(0), 0) for i, wnid in enumerate(WNIDS)]
    rows.append((4, "n00001740", "entity", "anything", 3, np.arange(1, 4), 2))
    synsets = np.array(rows, dtype=[(field, object) for field in fields]).reshape(-1, 1)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add_file(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "\n".join(str(number) for number in (3, 1, 2, 2, 1, 3, 3)) + "\n"
        add_file(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return folder


@pytest.fixture
def published(archives: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small archives, with their md5 sums in the place of the published ones."""
    for kind, (name, _) in ARCHIVE_META.items():
        md5 = hashlib.md5((archives / name).read_bytes()).hexdigest()
        monkeypatch.setitem(ARCHIVE_META, kind, (name, md5))
    return archives


def prepare(archives: Path, output: Path) -> int:
    return prepare_imagenet.main(["--archives", str(archives), "--output", str(output)])


def test_imagenet_becomes_an_image_folder(published: Path, tmp_path: Path) -> None:
    assert prepare(published, tmp_path / "out") == 0
    train, val = ImageFolder(tmp_path / "out" / "train"), ImageFolder(tmp_path / "out" / "val")
    assert train.classes == val.classes == WNIDS
    assert train.targets == [0] * 5 + [1] * 5 + [2] * 5
    # The labels of the development kit, 3 1 2 2 1 3 3, in the order of the file names.
    labels = {Path(path).name: target for path, target in val.samples}
    assert [labels[name] + 1 for name in sorted(labels)] == [3, 1, 2, 2, 1, 3, 3]


def test_interrupted_imagenet_is_completed(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert prepare(published, output) == 0
    whole = tree_digest(output)
    (output / "train").rename(output / "train.partial")  # as a kill leaves it
    shutil.rmtree(output / "train.partial" / WNIDS[2])
    capsys.readouterr()
    assert prepare(published, output) == 0
    assert "val: already there" in capsys.readouterr().out
    assert tree_digest(output) == whole


def test_missing_archives_are_named(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (published / "ILSVRC2012_img_val.tar").unlink()
    assert prepare(published, tmp_path / "out") == 2
    assert "lacks ILSVRC2012_img_val.tar" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_damaged_archives_are_named(
    published: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((published / name).read_bytes())
    content[len(content) // 2] ^= 1
    (published / name).write_bytes(content)
    assert prepare(published, tmp_path / "out") == 2
    assert name in capsys.readouterr().err
