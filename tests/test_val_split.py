"""--val-split: which training images are held out, what they decide, and that the test set decides nothing then."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY, call_main, tiny_tree

from datasets import DataError, DataOptions, Part, build_dataset, build_held_out, fingerprint, split_by_class
from options import ArgumentError, check_args, get_args_parser
from oversmoothing.weights import read_checkpoint
from readers.images import BadImageError

PLAIN = ("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--aa", "none", "--reprob", "0", "--no-repeated-aug")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("data"), train=24)


def options_of(data: Path, share: float = 0.25, seed: int = 0) -> DataOptions:
    return DataOptions(
        data_set="FOLDER", data_path=str(data), input_size=32, aa="none", val_split=share, val_split_seed=seed
    )


def files_of(dataset: Part) -> set[str]:
    return {path for path, _ in dataset.samples}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_every_class_gives_its_share_and_no_image_is_in_both_parts(share: float) -> None:
    labels = np.repeat([0, 1, 2], [2, 10, 100])[np.random.default_rng(0).permutation(112)]
    kept, held_out = split_by_class(labels, share, seed=0)
    assert sorted(kept + held_out) == list(range(112)) and kept == sorted(kept) and held_out == sorted(held_out)
    for label, size in enumerate((2, 10, 100)):
        assert (labels[held_out] == label).sum() == min(max(round(share * size), 1), size - 1)


def test_the_choice_depends_on_its_seed_and_in_a_class_on_nothing_else() -> None:
    labels = np.repeat([0, 1], 50)
    first = split_by_class(labels, 0.2, seed=0)
    assert first == split_by_class(labels, 0.2, seed=0)
    assert first[1] != split_by_class(labels, 0.2, seed=1)[1]
    more = split_by_class(np.repeat([0, 1, 2], 50), 0.2, seed=0)
    assert [index for index in more[1] if index < 100] == first[1]
    with pytest.raises(ValueError, match="class 3 has one image"):
        split_by_class(np.array([0, 0, 3]), 0.5, seed=0)


def test_training_and_held_out_images_are_the_training_set(data: Path) -> None:
    options = options_of(data)
    train, classes = build_dataset(True, options)
    held_out = build_held_out(options)
    whole, _ = build_dataset(True, replace(options, val_split=0.0))
    assert classes == 3 and len(held_out) == 6 and len(train) == 18
    assert files_of(train) | files_of(held_out) == {path for path, _ in whole.samples}
    assert not files_of(train) & files_of(held_out)
    assert files_of(build_held_out(options_of(data, seed=1))) != files_of(held_out)
    # As evaluation images are: nothing is drawn.
    torch.testing.assert_close(held_out[0][0], held_out[0][0], rtol=0, atol=0)
    # The test set is as it was.
    test, _ = build_dataset(False, options)
    assert len(test) == 7 and all("/val/" in path for path, _ in test.samples)


def test_a_part_has_a_fingerprint_of_its_own(data: Path, tmp_path: Path) -> None:
    """A resumed run compares it; from archives too."""
    for split in ("train", "val"):
        shutil.make_archive(str(tmp_path / split), "tar", data / split)
    for root in (data, tmp_path):
        parts = [build_dataset(True, options_of(root, seed=seed))[0] for seed in (0, 0, 1)]
        same, again, other = map(fingerprint, [*parts[:2], parts[2]])
        assert same == again != other and same != fingerprint(build_dataset(True, options_of(root, share=0.0))[0])


def test_a_bad_image_is_not_replaced_by_one_that_is_held_out(tmp_path: Path) -> None:
    root = tiny_tree(tmp_path, train=24)
    options = replace(options_of(root, share=0.5), skip_bad_images=1)
    train, _ = build_dataset(True, options)
    number, (path, label) = next(
        (i, sample) for i, sample in enumerate(train.dataset.samples) if "class_0" in sample[0]
    )
    Path(path).write_text("no image")
    after, expected = train.dataset.samples[number + 1]
    with pytest.warns(UserWarning, match="skipped bad image 1"):
        assert train[number][1] == expected
    assert after not in files_of(build_held_out(options))


def test_an_image_to_evaluate_on_is_never_replaced(tmp_path: Path) -> None:
    options = replace(options_of(tiny_tree(tmp_path, train=24), share=0.5), skip_bad_images=1)
    for dataset in (build_dataset(False, options)[0], build_held_out(options)):
        Path(dataset.samples[0][0]).write_text("no image")
        with pytest.raises(BadImageError, match="cannot read image .*: repair or remove it"):
            dataset[0]


def test_held_out_images_choose_the_checkpoint_and_the_test_set_is_logged_beside_them(
    data: Path, tmp_path: Path
) -> None:
    flags = (*TINY, *PLAIN, "--data-path", data, "--epochs", "4", "--lr", "0.05", "--val-split", "0.25")
    done = call_main(*flags, "--output_dir", tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert all({"val_loss", "val_acc1", "val_acc5", "test_acc1"} <= line.keys() for line in log)
    assert "--val-split 0.25: 6 training images held out" in done.stdout
    assert "on the 6 held-out images" in done.stdout and "on the 7 test images" in done.stdout
    assert "18 samples" not in done.stdout and "4 batches an epoch" in done.stdout  # 18 images in batches of 4
    accuracies = [line["val_acc1"] for line in log]
    best = read_checkpoint(tmp_path / "best_checkpoint.pth")
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert best["max_accuracy"]["acc1"] == max(accuracies)


def test_without_it_nothing_is_held_out(data: Path, tmp_path: Path) -> None:
    call_main(*TINY, *PLAIN, "--data-path", data, "--output_dir", tmp_path)
    [line] = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert not [name for name in line if name.startswith("val_")]


def test_what_cannot_be_split_is_named(data: Path, tmp_path: Path) -> None:
    root = tiny_tree(tmp_path, train=4)  # two classes have one image
    with pytest.raises(DataError, match="--val-split 0.5: class 1 has one image"):
        build_dataset(True, options_of(root, share=0.5))
    for value in ("1", "-0.1", "nan"):
        with pytest.raises(ArgumentError, match="--val-split .*: give a number 0 or more, below 1"):
            check_args(get_args_parser().parse_args(["--val-split", value]))
    call_main(*TINY, "--data-path", root, "--val-split", "0.5", code=2)
