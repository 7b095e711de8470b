"""Turns the three archives of ILSVRC 2012 into the tree that training reads: train/<wnid>/ and val/<wnid>/.

    python scripts/prepare_imagenet.py --archives ~/downloads --output data/imagenet

Registered users get the archives from https://image-net.org/challenges/LSVRC/2012/2012-downloads.php:
ILSVRC2012_img_train.tar (138 GB), ILSVRC2012_img_val.tar (6.3 GB) and ILSVRC2012_devkit_t12.tar.gz (2.5 MB).
torchvision verifies and unpacks them; a split that is finished is not unpacked again.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

from torchvision.datasets.imagenet import (
    ARCHIVE_META,
    META_FILE,
    parse_devkit_archive,
    parse_train_archive,
    parse_val_archive,
)


def unpack_once(target: Path, step: Callable[[str], None]) -> None:
    """Calls ``step`` with the name of a temporary folder beside ``target`` and renames it when it is complete."""
    if target.is_dir():
        print(f"{target}: already there", flush=True)
        return
    print(f"{target}: verifying and unpacking (this takes a while)", flush=True)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
    step(partial.name)
    partial.rename(target)
    print(f"{target}: done, {sum(1 for _ in target.iterdir())} classes", flush=True)


def prepare_imagenet(archives: Path, output: Path) -> None:
    """Makes ``output/train`` and ``output/val``.

    Args:
        archives: Folder of the three archives, under their published names.
        output: Folder of the data set; made if needed.

    Raises:
        FileNotFoundError: If an archive is missing.
        RuntimeError: If an archive is not the published one (its md5 sum differs).
    """
    paths = {kind: (archives / name).resolve() for kind, (name, _) in ARCHIVE_META.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"--archives {archives} lacks {', '.join(missing)}: get them from "
            "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
        )
    output.mkdir(parents=True, exist_ok=True)
    if not (output / META_FILE).is_file():
        parse_devkit_archive(output, str(paths["devkit"]))
    unpack_once(output / "val", lambda folder: parse_val_archive(output, str(paths["val"]), folder=folder))
    unpack_once(output / "train", lambda folder: parse_train_archive(output, str(paths["train"]), folder=folder))


def main(argv: list[str] | None = None) -> int:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description="Unpack the archives of ILSVRC 2012 into train/ and val/.")
    parser.add_argument("--archives", type=entry.user_path, default=Path("."), help="folder of the three archives (.)")
    parser.add_argument(
        "--output", type=entry.user_path, default=Path("data/imagenet"), help="folder to write (data/imagenet)"
    )
    args = parser.parse_args(argv)
    return entry.explained(lambda: prepare_imagenet(args.archives, args.output), RuntimeError, OSError)


if __name__ == "__main__":
    entry.run(main)
