"""ReaL: the reassessed labels of ImageNet's validation images, often several for one image and sometimes none.

The file is ``real.json`` of https://github.com/google-research/reassessed-imagenet, a JSON list of lists of labels:
entry i belongs to ``ILSVRC2012_val_<i + 1, eight digits>.JPEG``. Images are found by that name, whatever their order.

Source: "Are we done with ImageNet?", arXiv 2006.07159.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .archives import DataError, Member, shown
from .files import read_file

CLASSES = 1000  # labels are positions among ImageNet's classes
MAX_JSON = 64 << 20  # bytes; the published file has 0.6 million
NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+$")  # also of <position>-<name>.jpg, as prepare_wds.py writes
NO_LABEL = -1


def read_real_labels(path: str | Path) -> np.ndarray:
    """Labels of the images in the order of their numbers.

    Returns:
        Shape (images, most labels of one image), int64; rows of fewer labels end with ``NO_LABEL``.

    Raises:
        DataError: If it is not such a file; with the first bad entry.
    """
    try:
        entries = json.loads(read_file(path, MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--real-labels {path} cannot be read as json ({reason}): give ReaL's real.json") from error
    if not isinstance(entries, list) or not any(entries):
        raise DataError(f"--real-labels {path} is no list that holds labels: give ReaL's real.json")
    for number, labels in enumerate(entries, start=1):
        name = f"entry {number} (ILSVRC2012_val_{number:08d})"
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise DataError(f"--real-labels {path}: {name} is no list of whole numbers: give ReaL's real.json")
        if not all(0 <= label < CLASSES for label in labels):
            raise DataError(f"--real-labels {path}: {name} is {labels}: labels count ImageNet's classes, from 0 to 999")
    table = np.full((len(entries), max(map(len, entries))), NO_LABEL)
    for row, labels in zip(table, entries, strict=True):
        row[: len(labels)] = labels
    return table


def image_number(name: str) -> int:
    """The number in the name of a validation image, counted from 1.

    Raises:
        DataError: If it has none.
    """
    found = NUMBER.search(name)
    if not found:
        raise DataError(
            f"--real-labels: {shown(name)} is not named ILSVRC2012_val_<8 digits>, by which its labels are found: "
            "evaluate ImageNet's own validation images, under their names"
        )
    return int(found[1])


class WithRealLabels(Dataset):
    """A data set whose targets have the ReaL labels beside the plain one.

    Args:
        dataset: A data set of files: its ``samples`` are (file, label).
        path: Path of ``real.json``; it must have as many entries as there are images.

    Raises:
        DataError: If the file is not usable or does not belong to these images. Names in remote shards are known only
            once their shard is there, so the error may also come from ``[]``.
    """

    def __init__(self, dataset: Dataset, path: str | Path) -> None:
        if not hasattr(dataset, "samples"):
            raise DataError(f"--real-labels {path}: this --data-set has no file names, by which labels are found")
        self.dataset, self.path = dataset, path
        self.samples, self.classes, self.root = dataset.samples, dataset.classes, dataset.root
        self.remote = getattr(dataset, "remote", None)
        self.table = read_real_labels(path)
        if len(self.table) != len(dataset):
            raise DataError(
                f"--real-labels {path} has {len(self.table)} entries, --data-path {self.root} {len(dataset)} images: "
                "give the file of these images (ReaL's is of ImageNet's 50,000 validation images)"
            )
        self._rows = None
        if self.remote is None:
            names = [_name(file) for file, _ in self.samples]
            self._rows = [self._row(name) for name in names]
            row, images = Counter(self._rows).most_common(1)[0]
            if images > 1:
                raise DataError(f"--data-path {self.root}: {images} images are named ILSVRC2012_val_{row + 1:08d}")

    def _row(self, name: str) -> int:
        number = image_number(name)
        if not 1 <= number <= len(self.table):
            raise DataError(f"--real-labels {self.path} has {len(self.table)} entries, none for {shown(name)}")
        return number - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image, and its targets of shape (1 + most labels of one image,): its label, then ReaL's."""
        image, label = self.dataset[index]
        row = self._row(_name(self.samples[index][0])) if self._rows is None else self._rows[index]
        return image, torch.tensor([label, *self.table[row].tolist()])

    def __len__(self) -> int:
        return len(self.dataset)


def _name(file: str | Member) -> str:
    return file if isinstance(file, str) else file.name
