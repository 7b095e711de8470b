"""CPU time of loading a training image: from files, an archive or shards, plain or fast.

    python scripts/benchmark_data.py                            # photographs made from scikit-learn's two
    python scripts/benchmark_data.py --data-path /data/imagenet # images of that tree (or archive), spread over it
    python scripts/benchmark_data.py --quick

The images are copied to a temporary folder, packed there into one tar, into shards, and into shards of smaller files
(prepare_wds.py --max-side 400), and read from all four, by the plain loader and by --fast-loader. All take turns, each
with one worker process, over the same images in the same order. The cost of a round is the CPU time of that worker and
of the main process that receives its batches, so other programs affect it little; the ratio is the median over the
rounds. A table of shares says how much of a sample is decoding, cropping and resizing, RandAugment and the rest. The
files are in the file cache: disk and network time are not in the table. The device's part of the fast loader
(normalisation, erasing) and downloading remote shards are reported separately.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import numpy as np
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

import datasets
import fastload
import samplers
from readers import shards
from readers.images import decode, load_image, open_image
from readers.loader import build_loader, seeded
from scripts import markdown
from scripts.prepare_wds import prepare_wds

SIZE = (500, 375)  # the most frequent of ImageNet
MAX_SIDE = 400
DECODE, REMOTE = "open, decode", "wds, remote"  # a stage, and a loader


def make_photographs(folder: Path, number: int, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    """Writes different JPEG files with the detail and the file size (about 90 kB at 500x375) of ImageNet's.

    Each is a random crop of one of scikit-learn's two photographs with other brightness and colours, and with the
    grain that the scaled-down originals lack.

    Args:
        folder: Gets the files, as one class of a ``train/`` and a ``val/`` tree.
        number: Files in ``train/``; ``val/`` gets one.
        size: Width and height in pixels.
        seed: Seed of all draws.
    """
    rng = np.random.default_rng(seed)
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for split, count in (("train", number), ("val", 1)):
        (folder / split / "photographs").mkdir(parents=True)
        for i in range(count):
            original = originals[i % len(originals)]
            width = rng.integers(500, 570)
            left, top = rng.integers(0, original.width - width + 1), rng.integers(0, original.height - 427 + 1)
            height = min(width * 3 // 4, original.height)
            image = original.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))
            image = ImageEnhance.Color(image).enhance(rng.uniform(0.5, 1.5))
            grain = rng.normal(0, rng.uniform(3, 9), (*size[::-1], 1)) + rng.normal(0, 2, (*size[::-1], 3))
            pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
            quality = int(rng.integers(90, 97))
            Image.fromarray(pixels).save(folder / split / "photographs" / f"{i:05}.jpg", quality=quality)


def copy_images(source: Path, folder: Path, number: int) -> None:
    """Copies training images, evenly spread over a tree or an archive, to a small tree; ``val/`` gets one a class."""
    dataset, _ = datasets.build_dataset(True, recipe_of("FOLDER", source))
    for i in range(0, len(dataset), -(-len(dataset) // number)):
        file, label = dataset.samples[i]
        content = Path(file).read_bytes() if isinstance(file, str) else file.read()
        for split in ("train", "val"):
            path = folder / split / dataset.classes[label] / f"{i:08}{Path(str(file)).suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if split == "train" or not any(path.parent.iterdir()):
                path.write_bytes(content)


def recipe_of(data_set: str, path: Path) -> datasets.DataOptions:
    """The default recipe on a data set."""
    return datasets.DataOptions(data_set=data_set, data_path=str(path))


def build_sets(tree: Path, folder: Path, shard_images: int = 64) -> dict[str, Any]:
    """The training images of a tree: its files, an archive, shards, and shards of smaller files; each plain and fast.

    Args:
        tree: Of ``train/`` and ``val/``.
        folder: Gets ``images.tar`` and the folders ``wds`` and ``smaller``.
        shard_images: Images of a shard.
    """
    archive = Path(shutil.make_archive(str(folder / "images"), "tar", tree))
    prepare_wds(tree, folder / "wds", (shard_images, float("inf")), seed=0)
    prepare_wds(tree, folder / "smaller", (shard_images, float("inf")), seed=0, max_side=MAX_SIDE)
    sets = {}
    for name, kind, path in (
        ("", "FOLDER", tree),
        ("archive", "FOLDER", archive),
        ("wds", "wds", folder / "wds"),
        (f"wds {MAX_SIDE} px", "wds", folder / "smaller"),
    ):
        recipe = recipe_of(kind, path)
        sets[name or "plain"] = datasets.build_dataset(True, recipe)[0]
        sets[f"{name} fast".strip()] = fastload.build_dataset(recipe)[0]
    return sets


def fetching(folder: Path) -> list[dict[str, Any]]:
    """Milliseconds of CPU time an image to fetch remote shards and to index them, without a network."""
    with tempfile.TemporaryDirectory() as cache:
        split = shards.open_split(f"pipe:cat {folder}/{{}}", "train")
        remote = shards.RemoteMembers(split, Path(cache), float("inf"))
        began = sum(os.times()[:4])  # of this process and of its children
        for shard in range(len(split.names)):
            remote.fetch(shard)
        seconds = sum(os.times()[:4]) - began
    return [dict(loader=REMOTE, stage="fetch (cat), index", ms=1e3 * seconds / len(remote))]


def data_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the loaders (``loader``, ``images_per_core_s``, ``ratio``) and of their stages (``stage``, ``ms``).

    Args:
        args: Reads ``quick``; where present also ``data_path``, ``size``, ``images`` (a round), ``rounds``,
            ``batch_size`` and ``repeated_aug``.
    """
    torch.set_num_threads(1)
    number = getattr(args, "images", None) or (128 if args.quick else 512)
    rounds = getattr(args, "rounds", None) or (3 if args.quick else 9)
    with tempfile.TemporaryDirectory() as temporary:
        path, tree = getattr(args, "data_path", None), Path(temporary, "tree")
        if path:
            copy_images(Path(path), tree, min(number, 256))
        else:
            make_photographs(tree, min(number, 256), tuple(getattr(args, "size", None) or SIZE))
        sets = build_sets(tree, Path(temporary))
        number = min(number, 10 * len(sets["plain"]))
        batch_size, processes = getattr(args, "batch_size", None) or 64, getattr(args, "repeated_aug", None)
        rows = compare_loaders(sets, number, rounds, batch_size, processes)
        of_files = {name: sets[name] for name in ("plain", "fast", f"wds {MAX_SIDE} px fast")}
        rows += stages(of_files, recipe_of("FOLDER", tree), 2 if args.quick else 5)
        rows += fetching(Path(temporary, "wds"))
    print(format_loaders(rows), flush=True)
    return rows


def compare_loaders(
    sets: dict[str, Any], number: int, rounds: int, batch_size: int, processes: int | None = None
) -> list[dict[str, Any]]:
    """Images per second of CPU time of each data set, loaded by one worker; ratios are relative to the first.

    Args:
        sets: Data sets of the same images.
        number: Images a round.
        rounds: Rounds that count.
        batch_size: Images a batch.
        processes: The order is that of repeated augmentation in the first of so many processes; None switches it off:
            then an image is hardly ever read twice in a row.
    """
    batch_size = min(batch_size, number)
    loaders = {}
    for name, dataset in sets.items():
        subset = torch.utils.data.Subset(dataset, [i % len(dataset) for i in range(number)])
        repeated = dict(world_size=processes or 1, rank=0, repeated_aug=processes is not None)
        sampler = samplers.build_samplers(subset, subset, **repeated, seed=0)[0]
        image_bytes = 3 * datasets.DataOptions.input_size**2 if "fast" in name else 0
        loaders[name] = build_loader(
            subset,
            sampler,
            batch_size=batch_size,
            num_workers=1,
            pin_memory=False,
            drop_last=True,
            image_bytes=image_bytes,
        )
    costs: dict[str, list[float]] = {name: [] for name in sets}
    walls: dict[str, list[float]] = {name: [] for name in sets}
    for epoch in range(rounds + 1):
        for name in sorted(sets, reverse=epoch % 2 == 0):
            loaders[name].sampler.set_epoch(epoch)
            began, cpu = time.perf_counter(), _processor_seconds()
            count = sum(len(labels) for _, labels in loaders[name])
            if epoch > 0:  # in the first, the workers start and fill the file cache
                costs[name].append((_processor_seconds() - cpu) / count)
                walls[name].append((time.perf_counter() - began) / count)
    plain = next(iter(sets))
    return [
        dict(
            loader=name,
            images=number,
            rounds=rounds,
            images_per_core_s=1 / statistics.median(costs[name]),
            ratio=statistics.median(a / b for a, b in zip(costs[plain], costs[name], strict=True)),
            wall_ratio=statistics.median(a / b for a, b in zip(walls[plain], walls[name], strict=True)),
            cpu_rounds_s=costs[name],
        )
        for name in sets
    ]


def _processor_seconds() -> float:
    """CPU seconds of this process and of its workers; only one worker works at a time."""
    seconds = time.process_time()
    for worker in multiprocessing.active_children():
        # Fields 14 and 15 (the name in brackets is field 2): user and kernel time, in clock ticks.
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def stages(sets: dict[str, Any], recipe: argparse.Namespace, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds an image of every step of the transforms, of making a batch, and of the device's part on a CPU."""
    rows = []
    for name, dataset in sets.items():
        decodes_later = dataset.loader is not load_image
        times: dict[str, float] = defaultdict(float)

        def timed(stage: str, step: Callable[..., Any], *inputs: Any, times: dict[str, float] = times) -> Any:
            began = time.thread_time()
            output = step(*inputs)
            times[stage] += time.thread_time() - began
            return output

        batch = []
        files = [dataset.samples[i][0] for i in range(min(64, len(dataset.samples)))]
        for seed in range(repeats):
            batch = []
            for i, path in enumerate(files):
                with seeded(samplers.sample_seed(seed, 0, 0, i)):
                    image = timed("open" if decodes_later else DECODE, dataset.loader, path)
                    for step in dataset.transform.transforms:
                        stage = getattr(step, "__name__", type(step).__name__).strip("_")
                        image = timed(stage, step, image)
                batch.append(image)
                if decodes_later:  # it is part of the crop's time: once more alone, for the whole image
                    timed(f"{DECODE} (of these)", lambda path: decode(open_image(path)), path)
            batch = timed("collate", torch.stack, batch)
            if decodes_later:
                timed("device's part, on this CPU", fastload.build_device_transform(recipe), batch)
        total = repeats * len(files)
        rows += [dict(loader=name, stage=stage, ms=1e3 * value / total) for stage, value in times.items()]
    return rows


def share_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """For each loader: milliseconds an image in the worker, and the shares of decoding, resizing and RandAugment.

    Args:
        rows: From :func:`stages`.
    """
    table = []
    for loader in dict.fromkeys(row["loader"] for row in rows):
        times = {row["stage"]: row["ms"] for row in rows if row["loader"] == loader}
        times = {stage: ms for stage, ms in times.items() if not stage.startswith("device")}
        decoding = times.pop(f"{DECODE} (of these)", 0)
        total = sum(times.values())
        crop = sum(times.get(name, 0) for name in ("open", "RandomResizedCropOfFile")) - decoding if decoding else None
        crop = times.get("RandomResizedCropAndInterpolation", 0) if crop is None else crop
        parts = decoding or times[DECODE], crop, times.get("RandAugment", 0)
        shares = [f"{part:.2f} ({part / total:.0%})" for part in (*parts, total - sum(parts))]
        table.append([loader, *shares, f"{total:.2f}"])
    return table


def format_loaders(rows: list[dict[str, Any]]) -> str:
    """Markdown tables: the loaders, then their stages."""
    loaders = [
        [row["loader"], f"{row['images_per_core_s']:.0f}", f"{row['ratio']:.2f}", f"{row['wall_ratio']:.2f}"]
        for row in rows
        if "ratio" in row
    ]
    stages = [[row["loader"], row["stage"], f"{row['ms']:.3f}"] for row in rows if "stage" in row]
    first = markdown.table(("loader", "images/s per core", "ratio", "wall ratio"), loaders)
    of_transforms = [row for row in rows if "stage" in row and row["loader"] != REMOTE]
    header = ("loader, ms an image", DECODE, "crop, resize", "RandAugment", "rest", "all")
    shares = markdown.table(header, share_rows(of_transforms))
    return f"\n{first}\n\n{shares}\n\n{markdown.table(('loader', 'stage', 'ms an image'), stages, text_columns=2)}"


def cli() -> int:
    """Measures alone, without the other tables."""
    return entry.explained(main, datasets.DataError, OSError)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", help="tree or archive of train/ and val/; left out: photographs are made")
    parser.add_argument("--size", type=int, nargs=2, metavar=("W", "H"), help="of these, in pixels; default 500 375")
    parser.add_argument("--images", type=int, help="a round; default 512 (--quick: 128)")
    parser.add_argument("--rounds", type=int, help="default 9 (--quick: 3)")
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument(
        "--repeated-aug",
        type=int,
        choices=range(1, 1025),
        metavar="PROCESSES",
        help="in the order of repeated augmentation, as the first of so many processes gets it; default: off",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results-file", type=entry.user_path, metavar="JSON")
    args = parser.parse_args()
    rows = data_table(args)
    if args.results_file:
        args.results_file.write_text(json.dumps({"data": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    entry.run(cli)
