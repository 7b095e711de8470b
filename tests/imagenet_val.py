"""A small validation set with the names of ImageNet's, and its ReaL labels in the published form."""

import json
from pathlib import Path

import numpy as np


def name_as_imagenet(tree: Path) -> list[Path]:
    """Renames a tree's validation images to ILSVRC2012_val_00000001.JPEG and so on; numbers are mixed over the classes.

    Returns:
        Their new paths, by number.
    """
    files = sorted((tree / "val").glob("*/*"))
    numbers = np.random.default_rng(0).permutation(len(files))
    named = [
        file.with_name(f"ILSVRC2012_val_{number + 1:08d}.JPEG") for file, number in zip(files, numbers, strict=True)
    ]
    for file, new in zip(files, named, strict=True):
        file.rename(new)
    return sorted(named, key=lambda path: path.name)


def write_real_labels(file: Path, predicted: list[int]) -> None:
    """ReaL labels with which some predictions are right: of ten images two have no label, four the predicted one.

    Args:
        file: To write.
        predicted: Class of each image, by number.
    """
    rng = np.random.default_rng(1)
    entries = []
    for number, label in enumerate(predicted):
        others = [int(other) for other in rng.choice(1000, rng.integers(1, 5), replace=False) if other != label]
        entries.append([] if number % 5 == 0 else sorted([*others, label] if number % 5 < 3 else others))
    file.write_text(json.dumps(entries))
