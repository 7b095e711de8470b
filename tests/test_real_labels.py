"""ReaL labels find their images by name, in every kind of data set that has names; what does not fit is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from imagenet_val import name_as_imagenet, write_real_labels
from runs import tiny_tree
from torch.utils.data import default_collate

from datasets import DataError, DataOptions, build_dataset
from options import ArgumentError, check_args, get_args_parser
from readers import shards
from readers.real_labels import read_real_labels
from scripts.prepare_wds import prepare_wds

IMAGES = 11


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tree with ImageNet's names, and the file."""
    folder = tmp_path_factory.mktemp("real")
    tree = tiny_tree(folder / "tree", train=3, val=IMAGES)
    name_as_imagenet(tree)
    write_real_labels(folder / "real.json", list(range(IMAGES)))
    return tree, folder / "real.json"


def options_of(path: Path | str, real: Path, **more: object) -> DataOptions:
    return DataOptions(
        **({"data_set": "FOLDER", "data_path": str(path), "real_labels": str(real), "input_size": 32} | more)
    )


def labels_by_pixels(options: DataOptions) -> dict[bytes, tuple[int, tuple[int, ...]]]:
    """Label and ReaL labels of each image, which is known by its pixels."""
    dataset, _ = build_dataset(False, options)
    items = [dataset[index] for index in range(len(dataset))]
    assert default_collate(items)[1].shape[0] == IMAGES
    return {
        image.numpy().tobytes(): (target[0].item(), tuple(label for label in target[1:].tolist() if label >= 0))
        for image, target in items
    }


def test_labels_are_found_by_name(made: tuple[Path, Path]) -> None:
    tree, real = made
    entries = json.loads(real.read_text())
    dataset, classes = build_dataset(False, options_of(tree, real))
    assert (len(dataset), classes) == (IMAGES, 3)
    numbers = []
    for (file, label), (_, target) in zip(dataset.samples, dataset, strict=True):
        numbers.append(int(Path(file).stem[-8:]))
        found = [value for value in target.tolist()[1:] if value >= 0]
        assert target[0] == label and found == entries[numbers[-1] - 1]
    assert numbers != sorted(numbers)  # the order of the files is another one


@pytest.mark.parametrize("kind", ["tar", "zip", "wds", "remote wds", "skip bad images"])
def test_every_data_set_with_names_gives_the_same(kind: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    tree, real = made
    expected = labels_by_pixels(options_of(tree, real))
    assert len(expected) == IMAGES
    if kind in ("tar", "zip"):
        options = options_of(shutil.make_archive(str(tmp_path / "images"), kind, tree), real)
    elif kind == "skip bad images":
        options = options_of(tree, real, skip_bad_images=3)
    else:
        prepare_wds(tree, tmp_path / "shards", (4, float("inf")), seed=0)
        address = f"pipe:cat {tmp_path}/shards/{{}}" if kind == "remote wds" else str(tmp_path / "shards")
        shards.read_info.cache_clear()
        options = options_of(address, real, data_set="wds", shard_cache=str(tmp_path / "cache"))
    assert labels_by_pixels(options) == expected


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[[1], [2]", "cannot be read as json"),
        ('{"1": [2]}', "is no list that holds labels"),
        ("[]", "is no list that holds labels"),
        ("[[], []]", "is no list that holds labels"),
        ("[[1], 2]", r"entry 2 \(ILSVRC2012_val_00000002\) is no list of whole numbers"),
        ('[[1], ["2"]]', "entry 2 .* is no list of whole numbers"),
        ("[[1.0]]", "entry 1 .* is no list of whole numbers"),
        ("[[true]]", "entry 1 .* is no list of whole numbers"),
        ("[[0], [5, 1000]]", r"entry 2 .* is \[5, 1000\]: labels count ImageNet's classes, from 0 to 999"),
        ("[[-1]]", "from 0 to 999"),
        ("[" * 100_000, "cannot be read as json"),
        ("[[1], [2]]", "has 2 entries, --data-path .* 11 images"),
    ],
)
def test_a_file_of_another_form_is_refused(content: str, named: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(DataError, match=f"--real-labels .*{named}"):
        build_dataset(False, options_of(made[0], tmp_path / "real.json"))


def test_a_file_that_is_not_there_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=f"--real-labels {path} cannot be read"):
            read_real_labels(path)


def other_name(tree: Path) -> None:
    next((tree / "val").glob("*/*_00000004.JPEG")).rename(tree / "val" / "class_0" / "cat.JPEG")


def number_too_high(tree: Path) -> None:
    next((tree / "val").glob("*/*_00000004.JPEG")).rename(tree / "val" / "class_0" / "ILSVRC2012_val_00000012.JPEG")


def number_twice(tree: Path) -> None:
    file = next((tree / "val").glob("*/*_00000004.JPEG"))
    file.rename(file.with_name("ILSVRC2012_val_00000005.png"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_name, "cat.JPEG is not named ILSVRC2012_val_<8 digits>"),
        (number_too_high, "has 11 entries, none for .*ILSVRC2012_val_00000012.JPEG"),
        (number_twice, "2 images are named ILSVRC2012_val_00000005"),
    ],
)
def test_images_that_do_not_fit_are_named(
    change: Callable[[Path], None], named: str, made: tuple[Path, Path], tmp_path: Path
) -> None:
    tree = shutil.copytree(made[0], tmp_path / "tree")
    change(tree)
    with pytest.raises(DataError, match=named):
        build_dataset(False, options_of(tree, made[1]))


def test_a_data_set_without_names_is_refused(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets._build_split", lambda *given: [])
    with pytest.raises(DataError, match="this --data-set has no file names"):
        build_dataset(False, options_of(made[0], made[1], data_set="CIFAR10"))


def test_training_does_not_read_them(made: tuple[Path, Path]) -> None:
    assert not hasattr(build_dataset(True, options_of(*made))[0], "table")
    with pytest.raises(ArgumentError, match="--real-labels real.json needs --eval"):
        check_args(get_args_parser().parse_args(["--real-labels", "real.json"]))
