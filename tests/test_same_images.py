"""What belongs to a data set: links and special files in its folders, and whether a resumed run has the same images."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, call_main, tiny_tree
from torchvision.datasets import ImageFolder

import checkpoints
import datasets
import fit
from build import Start
from datasets import DataError, DataOptions
from oversmoothing.weights import read_checkpoint
from readers.images import BadImageError, load_image
from readers.loader import AddressedDataset
from reporting import EpochLog
from utils import World


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tiny_tree(tmp_path / "tree", train=18, val=6)


def images_of(tree: Path, **kwargs: Any) -> Any:
    options = DataOptions(data_set="FOLDER", data_path=str(tree), input_size=32, **kwargs)
    return datasets.build_dataset(True, options)[0]


# ---- what is in the folders ----


def test_the_order_is_that_of_torchvision(tree: Path) -> None:
    for name in ("class_1/b/0.png", "class_1/b-a/1.PNG", "class_1/Z.jpg", "class_0/\u00fc \u00f1.png", "class_0/n.txt"):
        (tree / "train" / name).parent.mkdir(exist_ok=True)
        shutil.copy(next(tree.glob("train/*/*")), tree / "train" / name)
    theirs = ImageFolder(tree / "train").samples
    assert images_of(tree).samples == theirs and len(theirs) == 22


def test_links_to_folders_neither_loop_nor_multiply(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = images_of(tree).samples
    folder = tree / "train" / "class_0"
    (folder / "deeper").mkdir()
    for name, target in (("loop", "."), ("deeper/up", ".."), ("deeper/itself", "."), ("again", "loop/deeper")):
        (folder / name).symlink_to(target)
    assert images_of(tree).samples == before
    assert "is a link to a folder of the same class: left out" in caplog.text
    for name in ("x", "y"):
        (folder / name).symlink_to("../class_1")
    found = images_of(tree).samples
    assert [label for _, label in found].count(0) == 2 * 18 // 3  # those of class_1 once more, as class_0


def test_special_files_are_bad_images_and_can_be_skipped(tree: Path) -> None:
    os.mkfifo(tree / "train" / "class_0" / "0000.jpg")
    (tree / "train" / "class_0" / "0001.jpg").symlink_to("nowhere")
    (tree / "train" / "class_0" / "0002.jpg").symlink_to("/dev/zero")
    dataset, skipping = images_of(tree), images_of(tree, skip_bad_images=3)
    places = {Path(path).name: place for place, (path, _) in enumerate(dataset.samples)}
    for name in ("0000.jpg", "0001.jpg", "0002.jpg"):
        with pytest.raises(BadImageError, match=rf"cannot read image .*{name} .*--skip-bad-images"):
            dataset[places[name]]
    with pytest.warns(UserWarning, match="skipped bad image 3 of at most 3"):
        assert [skipping[places[name]][1] for name in places].count(0) == 9


def test_a_file_beyond_any_image_is_not_read(tree: Path) -> None:
    path = next((tree / "train" / "class_0").iterdir())
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadImageError, match="is larger than 256 MB"):
        load_image(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_that_cannot_be_listed_is_named_and_not_left_out(tree: Path) -> None:
    folder = tree / "train" / "class_0" / "closed"
    folder.mkdir(mode=0o000)
    for parent in [tree, *tree.parents]:
        if parent.stat().st_uid == 0 and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(DataError, match="closed cannot be listed"):
            images_of(tree)
    finally:
        os.seteuid(0)


# ---- the same images after a resume ----


def test_a_fingerprint_tells_lists_of_images_apart_and_does_not_mind_a_move(tree: Path, tmp_path: Path) -> None:
    before = datasets.fingerprint(images_of(tree))
    assert datasets.fingerprint(AddressedDataset(images_of(tree, skip_bad_images=2))) == before
    moved = shutil.copytree(tree, tmp_path / "moved")
    assert datasets.fingerprint(images_of(moved)) == before
    image = next(moved.glob("train/class_0/*"))
    image.rename(image.with_name("renamed" + image.suffix))
    renamed = datasets.fingerprint(images_of(moved))
    assert renamed != before and renamed["images"] == before["images"]
    image.with_name("renamed" + image.suffix).rename(moved / "train" / "class_1" / "renamed.png")
    assert datasets.fingerprint(images_of(moved)) not in (before, renamed)
    archive = shutil.make_archive(str(tmp_path / "images"), "tar", tree)
    assert datasets.fingerprint(images_of(archive))["images"] == before["images"]


@pytest.mark.parametrize(
    ("saved", "step", "begins_again"), [("same", 1, False), ("other", 1, True), ("same", 99, True)]
)
def test_the_rest_of_an_epoch_is_trained_on_the_same_images_only(
    saved: str, step: int, begins_again: bool, tree: Path
) -> None:
    loader = torch.utils.data.DataLoader(AddressedDataset(images_of(tree)), batch_size=8)
    data = datasets.fingerprint(loader.dataset)
    then = data if saved == "same" else {**data, "images": 99}
    start = Start("x.pth", {"data": then}, full=True, epoch=2, step=step, meters={"loss": [0.0, 0.0]})
    found, returned = fit.check_images(start, loader, World(0, 0, 1, torch.device("cpu")))
    assert returned == data and (found.step, found.epoch) == (0 if begins_again else step, 2)
    assert (found.meters is None) == begins_again


@pytest.mark.parametrize("change", ["shrunk", "grown", "same"])
def test_a_resume_within_an_epoch_goes_on_whatever_became_of_the_data(change: str, tree: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data-path", tree, "--output_dir", tmp_path / "run", "--batch-size", 4, "--auto_reload")
    call_main(*flags, "--epochs", 1)
    path = tmp_path / "run" / checkpoints.CURRENT
    state = read_checkpoint(path)
    sums = {name: [1.0, 8.0] for name in ("loss", "lr")}
    within = {**state, "epoch": 0, "step": 3, "meters": {"0": sums}}
    checkpoints.write(within, path)
    if change == "shrunk":
        for image in sorted(tree.glob("train/*/*"))[::2]:
            image.unlink()
    elif change == "grown":
        image = next(tree.glob("train/*/*"))
        shutil.copy(image, image.with_name("one-more" + image.suffix))
    output = call_main(*flags, "--epochs", 2).stdout
    assert ("epoch 1 begins again: its first 3 batches were of other images" in output) == (change != "same")
    assert ("was trained on 18 images" in output) == (change != "same")
    assert [line["epoch"] for line in EpochLog.read(tmp_path / "run" / "log.txt")] == [0, 1]


def test_a_checkpoint_within_an_epoch_without_this_ranks_sums_is_explained(tree: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data-path", tree, "--output_dir", tmp_path / "run", "--batch-size", 4, "--auto_reload")
    call_main(*flags, "--epochs", 1)
    path = tmp_path / "run" / checkpoints.CURRENT
    checkpoints.write({**read_checkpoint(path), "step": 2, "meters": {}}, path)
    result = call_main(*flags, "--epochs", 2, code=2)
    assert "was saved within epoch 1, but has no sums of rank 0" in result.stderr
