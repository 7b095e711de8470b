"""Writes scikit-learn's 1,797 handwritten digits as an ImageFolder tree: a real data set without a download.

    python scripts/prepare_digits.py                        # writes data/digits
    python scripts/prepare_digits.py --output /tmp/digits
    python scripts/prepare_digits.py --output data/digits_1of2 --part 1/2     # every second training image
    python main.py --data-set FOLDER --data-path data/digits --input-size 32 ...

Images are 32x32 grey-scale PNG files, enlarged from 8x8 by bicubic interpolation. Of each digit, 36 images evenly
spaced over the collection are for validation: 360 in all, and 1,437 for training. Every run writes the same files.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(its test part, as shipped in scikit-learn).
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

IMAGE_SIZE = 32
VAL_IMAGES_PER_DIGIT = 36
OUR_FILES = re.compile(r"(train|val)(/\d(/\d{4}\.png)?)?")


def split_indices(labels: np.ndarray) -> dict[str, list[int]]:
    """Splits the collection, stratified by digit.

    Args:
        labels: Digits, shape (num_images,).

    Returns:
        Sorted indices of ``"train"`` and ``"val"``.
    """
    val: set[int] = set()
    for digit in np.unique(labels):
        members = np.flatnonzero(labels == digit)
        # Evenly spaced, because the collection is ordered by writer.
        val.update(members[np.arange(VAL_IMAGES_PER_DIGIT) * len(members) // VAL_IMAGES_PER_DIGIT].tolist())
    return {"train": [i for i in range(len(labels)) if i not in val], "val": sorted(val)}


def planned_files(part: int = 1, parts: int = 1) -> dict[str, np.ndarray]:
    """All files of the tree.

    Args:
        part: Which part of the training images of each digit, from 1; the validation images are always complete.
        parts: Number of parts; the images are dealt out to them in turn.

    Returns:
        Relative paths such as ``train/7/0012.png``, each with its image: shape (8, 8), values 0 to 16.
    """
    digits = load_digits()
    splits = split_indices(digits.target)
    of_digit = {digit: [i for i in splits["train"] if digits.target[i] == digit] for digit in range(10)}
    splits["train"] = sorted(i for members in of_digit.values() for i in members[part - 1 :: parts])
    return {
        f"{split}/{digits.target[i]}/{i:04d}.png": digits.images[i]
        for split, indices in splits.items()
        for i in indices
    }


def prepare_digits(output: Path, part: int = 1, parts: int = 1) -> bool:
    """Writes the tree, unless it is there and complete.

    Args:
        output: Folder of the tree; an incomplete tree of an earlier run is replaced.
        part: As in :func:`planned_files`.
        parts: As in :func:`planned_files`.

    Returns:
        Whether the tree was written.

    Raises:
        FileExistsError: If ``output`` holds anything that is not of this tree; nothing is deleted then.
    """
    images = planned_files(part, parts)
    if output.exists() or output.is_symlink():
        found = {path.relative_to(output).as_posix(): path for path in output.rglob("*")} if output.is_dir() else None
        foreign = ["itself"] if found is None else [name for name in found if not OUR_FILES.fullmatch(name)]
        if foreign:
            raise FileExistsError(
                f"--output {output} holds something else than the digits ({sorted(foreign)[0]}): "
                "choose another folder, or remove it"
            )
        if {name for name, path in found.items() if path.is_file() and path.stat().st_size > 0} == images.keys():
            return False
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the final rename is atomic and a killed run leaves no half tree.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        tree = Path(temporary) / "tree"
        for name, image in images.items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.rint(image * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(path)
        if output.exists():
            shutil.rmtree(output)
        tree.rename(output)
    return True


def _part(text: str) -> tuple[int, int]:
    """``K/N`` as two numbers."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: give the K-th of N parts as K/N, such as 1/2; N is at most 100")
    return int(match[1]), int(match[2])


def main(argv: list[str] | None = None) -> int:
    """Command line; see the head of this file. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the handwritten digits as an ImageFolder tree.")
    parser.add_argument(
        "--output", type=entry.user_path, default=Path("data/digits"), help="folder of the tree (data/digits)"
    )
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="K/N",
        help="the K-th of N parts of the training images, digit by digit (all)",
    )
    args = parser.parse_args(argv)
    return entry.explained(lambda: _report(args.output, prepare_digits(args.output, *args.part)), OSError)


def _report(output: Path, written: bool) -> None:
    counts = {split: sum(1 for _ in (output / split).glob("*/*.png")) for split in ("train", "val")}
    state = "wrote" if written else "already there:"
    print(f"{state} {output}: {counts['train']} training and {counts['val']} validation images, 10 classes")


if __name__ == "__main__":
    entry.run(main)
