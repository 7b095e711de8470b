"""Turns a tree of images (or its archive) into WebDataset shards with an index: few large files instead of millions.

    python scripts/prepare_wds.py --data-path /data/imagenet --output /data/imagenet-wds
    python scripts/prepare_wds.py --data-path /data/imagenet.zip --output /data/imagenet-wds --shard-size 1000
    python main.py --data-set wds --data-path /data/imagenet-wds ...

The tree holds train/<class>/ and val/<class>/, or train.tar and val.tar (or .zip), or is one archive of both. Images
are copied byte for byte, in an order shuffled with --seed, to train-000000.tar and so on: <number>-<name>.jpg with
<number>-<name>.cls, its label. The number is the image's position in the sorted tree, so that training on local
shards reads exactly the same images in the same order as training on the tree.

A run that was stopped continues when it is started again: finished shards are compared with the tree and kept, and an
unfinished one never has its final name. _info.json is written last: without it the folder is incomplete. A complete
folder can be copied to any web server or bucket.

    python scripts/prepare_wds.py --data-path /data/imagenet --output /data/imagenet-400 --max-side 400
    python scripts/prepare_wds.py --index /data/their-wds   # index existing shards (train-*.tar, val-*.tar)

--max-side makes smaller files, which are faster to read and decode: training images with a longer side are resized and
saved as JPEG of quality 90. Runs on them are not runs on the originals: compare like with like (docs/data.md).
Evaluation images are always copied.
"""

import argparse
import io
import json
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import numpy as np
from PIL import Image
from torchvision.datasets import DatasetFolder
from tqdm import tqdm

import datasets
from readers import archives, shards
from readers.archives import DataError, Member
from readers.images import load_image, open_image

SPLITS = ("train", "val")
SIZE = re.compile(r"(\d+)(MB)?", re.IGNORECASE)
QUALITY = 90  # of what --max-side makes; FFCV's choice for ImageNet
EXTENSIONS = {".jpeg": "jpg"}  # what readers of WebDataset look for; the content stays the same


def shard_size(text: str) -> tuple[int, int | float]:
    """``--shard-size`` as the largest number of images and of bytes in a shard."""
    found = SIZE.fullmatch(text.strip())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give a number of images (1000) or of megabytes (100MB)")
    return (sys.maxsize, int(found[1]) * 10**6) if found[2] else (int(found[1]), float("inf"))


def seed_number(text: str) -> int:
    """``--seed`` as numpy takes it."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: give a whole number from 0 to {2**32 - 1}")
    return int(text)


def name_of(file: str | Member) -> str:
    """Path of an image within its data set."""
    return file if isinstance(file, str) else file.name


def key_of(index: int, file: str | Member) -> str:
    """Name of a sample, without extension: its position in the sorted tree, then its name there."""
    stem = posixpath.splitext(posixpath.basename(name_of(file)))[0]
    return f"{index:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:60]}"


def plan_shards(dataset: DatasetFolder, limit: tuple[int, int | float], seed: int) -> list[list[int]]:
    """Indices of the images of each shard, after a seeded shuffle; every image is in exactly one."""
    plan: list[list[int]] = []
    held = 0
    for index in np.random.RandomState(seed).permutation(len(dataset)).tolist():
        file, _ = dataset.samples[index]
        size = file.size if isinstance(file, Member) else os.path.getsize(file)
        if not plan or len(plan[-1]) >= limit[0] or held + size > limit[1]:
            plan.append([])
            held = 0
        plan[-1].append(index)
        held += size
    return plan


def pixels(text: str) -> int:
    """``--max-side`` as a number of pixels."""
    if not text.isdecimal() or not 32 <= int(text) <= 65500:  # what JPEG can hold
        raise argparse.ArgumentTypeError(f"{text!r} is no length: give a whole number of pixels from 32 to 65500")
    return int(text)


def shrink(file: str | Member, max_side: int | None) -> bytes | None:
    """An image as JPEG with its longer side reduced to ``max_side`` pixels; None if it is not longer than that.

    Raises:
        DataError: If it cannot be read.
    """
    if max_side is None or max(open_image(file).size) <= max_side:
        return None
    image = load_image(file)
    scale = max_side / max(image.size)
    size = tuple(max(round(scale * side), 1) for side in image.size)
    smaller = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(smaller, "JPEG", quality=QUALITY)
    return smaller.getvalue()


def write_shard(path: Path, dataset: DatasetFolder, indices: list[int], max_side: int | None = None) -> None:
    """Writes one shard under its final name, complete; see :func:`shrink` for ``max_side``."""
    from webdataset import TarWriter  # here: benchmarks, which make other sets, run without the package

    partial = path.with_suffix(".part")
    with open(partial, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for index in indices:
                source, label = dataset.samples[index]
                suffix = posixpath.splitext(name_of(source))[1].lower()
                extension = EXTENSIONS.get(suffix, suffix[1:])
                if content := shrink(source, max_side):
                    extension = "jpg"
                else:
                    content = source.read() if isinstance(source, Member) else Path(source).read_bytes()
                writer.write({"__key__": key_of(index, source), extension: content, "cls": str(label).encode()})
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def check_shard(path: Path, dataset: DatasetFolder, indices: list[int], max_side: int | None = None) -> np.ndarray:
    """Table of an existing shard, after a check that it holds exactly the images ``indices``: names, labels, sizes.

    Of the images that ``max_side`` makes smaller, only the first is made again to compare its size.

    Raises:
        DataError: If it holds something else.
    """
    table = shards.scan_shard(str(path))
    found = [(os.fsdecode(row["name"]).partition(".")[0], row["label"], row["size"]) for row in table]
    expected, compared = [], False
    for number, index in enumerate(indices):
        file, label = dataset.samples[index]
        if max_side is not None and max(open_image(file).size) > max_side:
            size = found[number][2] if compared and number < len(found) else len(shrink(file, max_side))
            compared = True
        else:  # a compressed member of a zip has its size only after it is read
            size = (
                os.path.getsize(file) if isinstance(file, str) else len(file.read()) if file.method > 0 else file.size
            )
        expected.append((key_of(index, file), label, size))
    if found != expected:
        raise DataError(
            f"--output {path.parent}: {path.name} holds other images than --data-path, --seed, --shard-size and "
            "--max-side make of it: give another folder, or remove the shards there"
        )
    return table


def prepare_wds(
    data_path: Path, output: Path, limit: tuple[int, int | float], seed: int, max_side: int | None = None
) -> dict[str, Any]:
    """Writes the shards that are not there yet, and then the index.

    Args:
        data_path: Tree or archive of ``train`` and ``val``.
        output: Folder of the shards; made if needed.
        limit: Largest number of images and of bytes of a shard.
        seed: Of the order.
        max_side: Largest side of a training image in pixels; None: as they are.

    Returns:
        The content of ``_info.json``.

    Raises:
        DataError: If the tree cannot be used, or ``output`` holds shards of something else.
    """
    options = datasets.DataOptions(data_set="FOLDER", data_path=str(data_path))
    if output.is_file():
        raise DataError(f"--output {output} is a file: give a folder")
    tables = {}
    for split, longest in zip(SPLITS, (max_side, None), strict=True):
        dataset, _ = datasets.build_dataset(split == "train", options, transform=lambda image: image)
        output.mkdir(parents=True, exist_ok=True)
        plan = plan_shards(dataset, limit, seed)
        paths = [output / f"{split}-{number:06d}.tar" for number in range(len(plan))]
        foreign = sorted(set(output.glob(f"{split}-*.tar")) - set(paths))
        if foreign:
            raise DataError(
                f"--output {output} holds {foreign[0].name}, which --data-path, --seed and --shard-size do not make: "
                "give another folder, or remove the shards there"
            )
        tables[split] = []
        with tqdm(total=len(dataset), desc=split, unit=" images", unit_scale=True) as progress:
            for path, indices in zip(paths, plan, strict=True):
                if not path.exists():
                    write_shard(path, dataset, indices, longest)
                tables[split].append((path.name, check_shard(path, dataset, indices, longest)))
                progress.update(len(indices))
    return write_index(output, tables, dataset.classes, max_side)


def index_shards(folder: Path) -> dict[str, Any]:
    """Writes the index of existing shards; class names of an existing index are kept.

    Raises:
        DataError: If there are none, or they are no shards of labelled images.
    """
    try:
        classes = shards.read_info(str(folder))[0].get("classes")
    except DataError:
        classes = None
    tables = {}
    for split, names in shards.SPLIT_NAMES.items():
        paths = sorted(path for name in names for path in folder.glob(f"{name}-*.tar"))
        if paths:
            tables[split] = [(path.name, shards.scan_shard(str(path))) for path in tqdm(paths, desc=split)]
    if not tables:
        raise DataError(f"--index {folder}: no train-*.tar and no val-*.tar there")
    number = 1 + max(int(table["label"].max()) for rows in tables.values() for _, table in rows)
    return write_index(folder, tables, classes or [str(label) for label in range(number)])


def write_index(
    output: Path, tables: dict[str, list[tuple[str, np.ndarray]]], classes: list[str], max_side: int | None = None
) -> dict[str, Any]:
    """Writes ``<split>.npy``, images in the order of their keys, and then ``_info.json``; returns the latter."""
    info: dict[str, Any] = {"classes": classes, "splits": {}} | ({"max_side": max_side} if max_side else {})
    for split, shards_of_split in tables.items():
        rows = []
        for number, (_, table) in enumerate(shards_of_split):
            rows += [(number, *row[1:-1], os.fsdecode(row[-1])) for row in table.tolist()]
        rows.sort(key=lambda row: row[-1])
        write_atomically(output / f"{split}.npy", lambda file, rows=rows: np.save(file, archives.make_table(rows)))
        info["splits"][split] = {
            "name": split,
            "num_samples": len(rows),
            "filenames": [name for name, _ in shards_of_split],
            "shard_lengths": [len(table) for _, table in shards_of_split],
        }
    content = json.dumps(info, indent=1).encode()
    write_atomically(output / shards.INFO_NAMES[0], lambda file: file.write(content))
    return info


def write_atomically(path: Path, write: Any) -> None:
    """Lets ``write`` fill a file that gets its final name only when it is complete."""
    partial = path.with_name(f"{path.name}.part")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-path", "--data_path", type=entry.user_path, metavar="DIR", help="tree or archive to read"
    )
    parser.add_argument("--output", type=entry.user_path, metavar="DIR", help="folder of the shards; made if needed")
    parser.add_argument(
        "--shard-size",
        "--shard_size",
        type=shard_size,
        default="100MB",
        metavar="N|MB",
        help="images a shard (1000), or megabytes (100MB, the default). Remote shards are fetched as a whole: 50 to "
        "500MB; local ones may be larger; give at least as many shards as processes",
    )
    parser.add_argument(
        "--max-side",
        "--max_side",
        type=pixels,
        metavar="PIXELS",
        help=f"resize training images so that the longer side has no more, and save them as JPEG of quality {QUALITY}; "
        "left out: copy all byte for byte. --shard-size counts the files as they were",
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the order of the images in the shards (0)")
    parser.add_argument(
        "--index", type=entry.user_path, metavar="DIR", help="only write the index of the shards in this folder"
    )
    args = parser.parse_args(argv)
    if args.index and args.max_side:
        parser.error("--max-side changes no shards that are there: give --data-path and --output with it")
    if (args.index is None) == (args.data_path is None or args.output is None):
        parser.error("give --data-path and --output, or --index alone")
    try:
        return entry.explained(lambda: _main(args), DataError, OSError)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return entry.EXIT_INTERRUPTED


def _main(args: argparse.Namespace) -> int:
    if args.index:
        folder, info = args.index, index_shards(args.index)
    else:
        settings = args.shard_size, args.seed, args.max_side
        folder, info = args.output, prepare_wds(args.data_path, args.output, *settings)
    for split in info["splits"].values():
        print(f"{split['name']}: {split['num_samples']} images in {len(split['filenames'])} shards")
    print(f"{len(info['classes'])} classes; train with --data-set wds --data-path {folder}")
    return 0


if __name__ == "__main__":
    entry.run(main)
