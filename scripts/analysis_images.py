"""The images of an analysis: from any folder or data set, decoded once for each input that the models need."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets import DataError, DataOptions, build_dataset, build_transform
from oversmoothing.analysis.subject import Subject
from readers.images import load_image
from utils import loader_processes


class ImageFiles(Dataset):
    """The images of any folder; labels are of no use here, so it need not be a tree of classes.

    Args:
        root: Folder, searched with its sub-folders; its ``val/`` alone if it has one.
        transform: Applied to the RGB image.
        flag: That gave the folder, for messages.

    Raises:
        DataError: If there is no such folder, or no image in it.
    """

    def __init__(self, root: Path, transform: Callable[[Any], Tensor], flag: str = "--data-path") -> None:
        if not root.is_dir():
            raise DataError(f"{flag} {root} {'is a file' if root.exists() else 'does not exist'}: give a folder")
        root = root / "val" if (root / "val").is_dir() else root
        self.files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        self.transform = transform
        if not self.files:
            raise DataError(f"{flag} {root}: no images ({', '.join(IMG_EXTENSIONS)}): give a folder that has some")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(load_image(str(self.files[index]))), 0

    def __len__(self) -> int:
        return len(self.files)


class Views(Dataset):
    """Each image once for every kind of input that the models need, and its label.

    Args:
        datasets: Data sets of the same images with different transforms.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = datasets

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], int]:
        samples = [dataset[index] for dataset in self.datasets]
        return tuple(image for image, _ in samples), samples[0][1]

    def __len__(self) -> int:
        return len(self.datasets[0])


def input_kind(subject: Subject) -> tuple:
    """Key of a model's input: models with equal keys share one decoded and transformed image."""
    config = subject.data_config
    return subject.input_size, config["mean"], config["std"], config["crop_pct"], config["interpolation"]


def options_of(args: argparse.Namespace, subject: Subject) -> DataOptions:
    """The command's image options for one model's input."""
    return replace(DataOptions.from_args(args), input_size=subject.input_size)


def build_loader(args: argparse.Namespace, subjects: Sequence[Subject]) -> tuple[DataLoader, list[int]]:
    """Loader of the chosen images, batches of (views, labels), and for each model which of the views is its input."""
    kinds: dict[tuple, int] = {}
    datasets = []
    for subject in subjects:
        if kinds.setdefault(input_kind(subject), len(datasets)) == len(datasets):
            options = options_of(args, subject)
            if args.data_set:
                datasets.append(build_dataset(False, options, subject.data_config)[0])
            else:
                transform = build_transform(False, options, subject.data_config)
                datasets.append(ImageFiles(Path(args.data_path).expanduser(), transform))
    views = Views(datasets)
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(args.seed))
    chosen = Subset(views, sorted(order[: args.num_images or None].tolist()))
    loader = DataLoader(chosen, batch_size=args.batch_size, num_workers=loader_processes(args.num_workers))
    return loader, [kinds[input_kind(subject)] for subject in subjects]
