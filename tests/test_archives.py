"""Images inside .tar and .zip files: the samples of the unpacked tree to the bit, and errors that say what to do."""

import io
import multiprocessing
import os
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import tiny_tree
from test_datasets import make_args, random_image
from torch.utils.data import DataLoader, Dataset

import datasets
import fastload
from options import get_args_parser
from readers import archives
from readers.archives import DataError
from readers.image_sets import MemberImages
from readers.images import BadImageError
from readers.loader import AddressedDataset, build_loader
from samplers import build_samplers

# A machine with fewer cores than a test has workers is no problem here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with sub-folders, names that sort otherwise than they were written, hidden folders, other files."""
    root = tiny_tree(tmp_path_factory.mktemp("images"), train=16, val=7)
    for name in ("class_1/b/0.png", "class_1/b-a/1.PNG", "class_1/Z.jpg", "class_0/ü ñ.png", ".hidden/0.png"):
        path = root / "train" / name
        path.parent.mkdir(exist_ok=True)
        random_image(len(name)).save(path)
    (root / "train" / "class_2" / "readme.txt").write_text("no image")
    os.link(root / "train" / "class_1" / "Z.jpg", root / "train" / "class_1" / "a-link.jpg")
    (root / "train" / "class_2" / "linked.jpg").symlink_to("../class_1/Z.jpg")
    return root


def pack_tar(path: Path, folder: Path, name: str = ".") -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, name)
    return path


def pack_zip(path: Path, folder: Path, prefix: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, f"{prefix}{file.relative_to(folder)}")
    return path


def one_tar(tree: Path, target: Path) -> Path:
    return pack_tar(target / "images.tar", tree)


def one_tar_with_an_enclosing_folder(tree: Path, target: Path) -> Path:
    return pack_tar(target / "images.TAR", tree, "imagenet")


def one_compressed_zip(tree: Path, target: Path) -> Path:
    return pack_zip(target / "images.zip", tree, method=zipfile.ZIP_DEFLATED)


def a_tar_of_each_split(tree: Path, target: Path) -> Path:
    for split in ("train", "val"):
        pack_tar(target / f"{split}.tar", tree / split)
    return target


def zip_and_tar_with_the_splits_folder(tree: Path, target: Path) -> Path:
    pack_zip(target / "train.zip", tree / "train", "train/")
    pack_tar(target / "val.tar", tree / "val", "val")
    return target


def archive_beside_a_folder(tree: Path, target: Path) -> Path:
    pack_tar(target / "train.tar", tree / "train")
    shutil.copytree(tree / "val", target / "val")
    return target


def a_macs_zip(tree: Path, target: Path) -> Path:
    path = pack_zip(target / "images.zip", tree, "photos/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/photos/train/class_0/._0000.jpeg", b"not an image")
        archive.writestr("photos/train/class_0/._0000.jpeg", b"not an image")
    return path


def assert_same_samples(ours: Dataset, theirs: Dataset) -> None:
    """Bit for bit, with the same random draws."""
    assert len(ours) == len(theirs)
    ours, theirs = AddressedDataset(ours), AddressedDataset(theirs)
    for index in range(len(theirs)):
        (image, label), (expected, expected_label) = ours[index, index], theirs[index, index]
        assert label == expected_label and torch.equal(image, expected)


@pytest.mark.parametrize(
    "pack",
    [
        one_tar,
        one_tar_with_an_enclosing_folder,
        one_compressed_zip,
        a_tar_of_each_split,
        zip_and_tar_with_the_splits_folder,
        archive_beside_a_folder,
        a_macs_zip,
    ],
)
def test_an_archive_gives_the_samples_of_the_unpacked_tree_to_the_bit(
    pack: Callable, tree: Path, tmp_path: Path
) -> None:
    args, plain = make_args(pack(tree, tmp_path), input_size=40), make_args(tree, input_size=40)
    assert datasets.count_classes(args) == 3
    for is_train in (True, False):
        ours, classes = datasets.build_dataset(is_train, args)
        theirs, expected = datasets.build_dataset(is_train, plain)
        assert isinstance(ours, MemberImages) or not is_train
        assert (classes, ours.classes) == (expected, theirs.classes)
        assert_same_samples(ours, theirs)


def epoch(dataset: Dataset, num_workers: int) -> list[torch.Tensor]:
    sampler, _ = build_samplers(dataset, dataset, world_size=1, rank=0, repeated_aug=True, seed=3)
    loader = build_loader(dataset, sampler, batch_size=4, num_workers=num_workers, pin_memory=False, drop_last=True)
    return [tensor for batch in loader for tensor in batch]


@pytest.mark.parametrize("fast", [False, True])
def test_worker_processes_and_the_fast_loader_read_archives(fast: bool, tree: Path, tmp_path: Path) -> None:
    batches = {}
    for path, workers in ((tree, 0), (one_tar(tree, tmp_path), 0), (one_tar(tree, tmp_path), 3)):
        args = get_args_parser().parse_args(["--data-set", "FOLDER", "--data-path", str(path), "--input-size", "64"])
        dataset, _ = fastload.build_dataset(args) if fast else datasets.build_dataset(True, args)
        assert dataset[0]  # the archive is open before the workers are forked
        batches[path == tree, workers] = epoch(dataset, workers)
    expected = batches[True, 0]
    assert len(expected) == 10
    for found in batches.values():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.slow
def test_workers_that_inherit_nothing_read_archives(tree: Path, tmp_path: Path) -> None:
    dataset, _ = datasets.build_dataset(False, make_args(one_tar(tree, tmp_path), input_size=32))
    expected = [image for image, _ in dataset]
    context = multiprocessing.get_context("forkserver")  # starts workers with a pickle, as "spawn" does, but sooner
    context.set_forkserver_preload(["main"])
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=context)
    assert all(torch.equal(image, other) for (image, _), other in zip(loader, expected, strict=True))


def test_few_files_stay_open(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_OPEN_FILES", 2)
    paths = [tmp_path / f"{number}.tar" for number in range(5)]
    for path in paths:
        pack_tar(path, tree / "val")
    members = [archives.read_tree(path, "val", alone=True).members for path in paths]
    for turn in range(2):
        for index in range(7):
            for of_archive in members[turn:]:
                assert of_archive[index][0].read() == members[0][index][0].read()
    assert sum(path in map(str, paths) for path in archives._open_files) == 2


def test_an_archive_that_is_written_anew_is_indexed_anew(tree: Path, tmp_path: Path) -> None:
    args = make_args(one_tar(tree, tmp_path), input_size=32)
    before, _ = datasets.build_dataset(False, args)
    assert before[0][1] == 0
    other = tiny_tree(tmp_path / "other", classes=2, train=2, val=8, seed=5)
    pack_tar(tmp_path / "new.tar", other).replace(tmp_path / "images.tar")
    after, classes = datasets.build_dataset(False, args)
    assert (len(before), len(after), classes) == (7, 8, 2)
    assert_same_samples(after, datasets.build_dataset(False, make_args(other, input_size=32))[0])


# ----------------------------------------------------------------------------------------------------------- bad images


@pytest.fixture
def spoiled(tree: Path, tmp_path: Path) -> Path:
    """A tar in which one training image is text and one is cut."""
    copy = shutil.copytree(tree, tmp_path / "copy", symlinks=True)
    (copy / "train" / "class_0" / "0003.png").write_bytes(b"<html>404</html>")
    cut = copy / "train" / "class_2" / "0002.jpeg"
    cut.write_bytes(cut.read_bytes()[:300])
    return one_tar(copy, tmp_path)


@pytest.mark.parametrize("fast", [False, True])
def test_an_unreadable_image_is_named_with_its_archive(fast: bool, spoiled: Path) -> None:
    args = make_args(spoiled, input_size=64)
    dataset, _ = fastload.build_dataset(args) if fast else datasets.build_dataset(True, args)
    names = [str(member) for member, _ in dataset.samples]
    for name in ("train/class_0/0003.png", "train/class_2/0002.jpeg"):
        with pytest.raises(BadImageError, match=f"cannot read image {spoiled}/{name} .*--skip-bad-images"):
            dataset[names.index(f"{spoiled}/{name}")]


def test_unreadable_images_of_an_archive_are_skipped_and_counted(spoiled: Path) -> None:
    dataset, _ = datasets.build_dataset(True, make_args(spoiled, input_size=32, skip_bad_images=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len([dataset[index] for index in range(len(dataset))]) == len(dataset)
    assert sorted(str(warning.message).rpartition("/")[2] for warning in caught) == ["0002.jpeg", "0003.png"]


# --------------------------------------------------------------------------------------------------- unusable archives


def cut(number: int) -> Callable[[Path, Path], Path]:
    def prepare(tree: Path, target: Path) -> Path:
        path = one_tar(tree, target)
        path.write_bytes(path.read_bytes()[:number])
        return path

    return prepare


def cut_before_its_end_mark(tree: Path, target: Path) -> Path:
    path = one_tar(tree, target)
    path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(-len(path.read_bytes().rstrip(b"\0")) % 512))
    return path


def compressed_as_a_whole(tree: Path, target: Path) -> Path:
    with tarfile.open(target / "images.tar", "w:gz") as archive:
        archive.add(tree, ".")
    return target / "images.tar"


def no_archive(tree: Path, target: Path) -> Path:
    (target / "images.zip").write_bytes(b"<html>404</html>" * 100)
    return target / "images.zip"


def cut_zip(tree: Path, target: Path) -> Path:
    path = one_compressed_zip(tree, target)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def bzip2_within_a_zip(tree: Path, target: Path) -> Path:
    return pack_zip(target / "images.zip", tree, method=zipfile.ZIP_BZIP2)


def dangling_link(tree: Path, target: Path) -> Path:
    path = one_tar(tree, target)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("train/class_0/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/somewhere/else.jpg"
        archive.addfile(link)
    return path


def without_val(tree: Path, target: Path) -> Path:
    return pack_tar(target / "images.tar", tree / "train", "train")


def only_train_archive(tree: Path, target: Path) -> Path:
    pack_tar(target / "train.tar", tree / "train")
    return target


def other_classes(tree: Path, target: Path) -> Path:
    copy = shutil.copytree(tree, target / "tree", symlinks=True)
    (copy / "val" / "class_2").rename(copy / "val" / "class_3")
    return a_tar_of_each_split(copy, target)


def class_without_images(tree: Path, target: Path) -> Path:
    path = one_tar(tree, target)
    with tarfile.open(path, "a") as archive:
        for split in ("train", "val"):
            folder = tarfile.TarInfo(f"./{split}/empty")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
    return path


def flat(tree: Path, target: Path) -> Path:
    with tarfile.open(target / "train.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0.jpg"), io.BytesIO())
    pack_tar(target / "val.tar", tree / "val")
    return target


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (cut(0), "images.tar is no tar file .*empty file"),
        (cut(20_000), "images.tar is no tar file .*unexpected end of data|no end mark"),
        (cut(9 * 512 + 100), "images.tar is no tar file"),
        (cut_before_its_end_mark, "images.tar is no tar file .*no end mark at byte"),
        (compressed_as_a_whole, "images.tar is no tar file .*repacked without compression"),
        (no_archive, "images.zip is no zip file"),
        (cut_zip, "images.zip is no zip file .*cut short"),
        (bzip2_within_a_zip, "compressed in a way that cannot be read in place: repack it with zip -0"),
        (dangling_link, "train/class_0/link.jpg only as a link to somewhere/else.jpg.*--dereference"),
        (without_val, "images.tar has no folder val/: --data-set FOLDER needs"),
        (only_train_archive, "has no folder val/ and no val.tar or val.zip"),
        (other_classes, "only in train/: class_2; only in val/: class_3: add or remove"),
        (class_without_images, "no valid file for the classes empty of"),
        (flat, "holds no folders"),
    ],
)
def test_unusable_archives_are_explained(prepare: Callable, message: str, tree: Path, tmp_path: Path) -> None:
    path = prepare(tree, tmp_path)
    for is_train in (True, False):
        with pytest.raises(DataError, match=message) as raised:
            datasets.build_dataset(is_train, make_args(path))
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_evaluation_without_train_needs_the_nominal_classes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        image = io.BytesIO()
        random_image(0, (4, 4)).save(image, "png")
        for number in range(100):
            archive.writestr(f"n{number:08d}/0.png", image.getvalue())
    assert datasets.build_dataset(False, make_args(tmp_path, data_set="IMNET100", input_size=32))[1] == 100
    with pytest.raises(DataError, match="no folder train/ and no train.tar"):
        datasets.build_dataset(False, make_args(tmp_path))
