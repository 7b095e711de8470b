"""How good a model's frozen features are: k-NN classification and a linear probe, without any training of the model.

    python scripts/probe_features.py --model vit_small_patch16_224 --pretrained --data-path /data/imagenet
    torchrun --nproc_per_node=8 scripts/probe_features.py --resume logs/run/checkpoint.pth --data-path /data/imagenet \\
        --feature cls --results-file probes.json --save-features features.npz

Every training and evaluation image goes through the model once, as in evaluation, without augmentation. Each process
keeps all features in memory; everything else is computed from them. With several processes each takes a share of the
images, and each image counts once. docs/probes.md explains the numbers.
"""

import argparse
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import numpy as np
import timm
import torch
import torch.distributed as dist
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import models  # noqa: F401  (registers the zoo with timm)
import utils
from datasets import DATA_SETS, DataError, DataOptions, build_dataset, build_transform, count_classes, split_by_class
from options import RANGES, Interval, KeyValues
from oversmoothing import remedies_of, remedy_options
from oversmoothing.weights import create_model, model_from_checkpoint, near_models, read_checkpoint, trained_with
from readers.loader import build_loader, start_workers
from samplers import build_samplers
from scripts import markdown
from scripts.explanations import explain_images, why_unwritable
from scripts.feature_probes import ROWS, Features, count_correct, fit_linear, knn_correct
from utils import SetupError, World

FEATURES = ("pre_logits", "cls", "mean")
COUNT, POSITIVE = Interval(1, 10**6), Interval(0, above=True)
NUMBERS = {
    **dict.fromkeys(("k", "batch_size", "linear_iterations", "dist_timeout"), COUNT),
    **dict.fromkeys(("temperature", "l2"), POSITIVE),
    **{name: RANGES[name] for name in ("input_size", "num_classes", "num_workers", "seed", "eval_crop_ratio")},
    "held_out": Interval(0, 1, above=True, below=True),
}


def get_parser() -> argparse.ArgumentParser:
    """The flags; those that main.py has too mean the same here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="of this zoo or of timm; default: as the checkpoint says")
    group.add_argument(
        "--resume", type=os.path.expanduser, metavar="FILE", help="checkpoint (file, URL, hf-hub:owner/name)"
    )
    group.add_argument("--ema", action="store_true", help="the EMA of the checkpoint's weights")
    group.add_argument("--pretrained", action="store_true", help="published weights of --model (downloads)")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE")
    group.add_argument(
        "--remedy", nargs="*", default=[], metavar="NAME", help="to add to the model; left out: as the checkpoint says"
    )
    group.add_argument("--remedy-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE")
    group.add_argument(
        "--feature",
        choices=FEATURES,
        default="pre_logits",
        help="what the model's head gets (the default), the class token, or the mean of the patches",
    )

    group = parser.add_argument_group("images")
    group.add_argument("--data-path", default="", metavar="DIR", help="as in main.py")
    group.add_argument("--data-set", choices=DATA_SETS, default="FOLDER", help="as in main.py (default: FOLDER)")
    group.add_argument("--inat-category", default="name", metavar="LEVEL", help="as in main.py")
    group.add_argument("--num-classes", type=int, metavar="N", help="of shards that do not name their classes")
    group.add_argument("--shard-cache", default="", metavar="DIR", help="as in main.py")
    group.add_argument("--download", action="store_true", help="fetch CIFAR or Fashion-MNIST to --data-path")
    group.add_argument("--input-size", type=int, metavar="PX", help="default: as the checkpoint says, or the model's")
    group.add_argument("--eval-crop-ratio", type=float, metavar="R", help="default: the model's own")

    group = parser.add_argument_group("k-NN")
    group.add_argument(
        "--k", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K", help="neighbours (default: 10 20 100 200)"
    )
    group.add_argument("--temperature", type=float, default=0.07, metavar="T", help="of the votes (default: 0.07)")

    group = parser.add_argument_group("linear probe")
    group.add_argument(
        "--l2",
        type=float,
        nargs="+",
        default=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
        metavar="W",
        help="penalties to choose from (default: 1e-5 1e-4 1e-3 1e-2 1e-1)",
    )
    group.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="F",
        help="share of the training images, of each class alike, that chooses the penalty (default: 0.1)",
    )
    group.add_argument("--linear-iterations", type=int, default=200, metavar="N", help="of L-BFGS (default: 200)")
    group.add_argument("--no-linear", action="store_true", help="k-NN alone")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--bank-dtype", choices=("float32", "float16"), default="float32", help="of the features in memory"
    )
    group.add_argument("--save-features", type=entry.user_path, metavar="NPZ", help="features, labels, linear logits")
    group.add_argument("--results-file", type=entry.user_path, metavar="JSON")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="images of each process (default: 64)")
    group.add_argument(
        "--num_workers", "--num-workers", type=int, default=4, metavar="N", help="as in main.py (default: 4)"
    )
    group.add_argument("--device", default="auto", metavar="NAME", help="auto (CUDA if there is a GPU), cuda or cpu")
    group.add_argument(
        "--amp-dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float32",
        help="precision of the forward pass (default: float32)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the held-out images, and of initial weights")
    group.add_argument("--dist_url", "--dist-url", default="env://", metavar="URL", help="rendezvous of the processes")
    group.add_argument(
        "--dist-timeout", type=int, default=7200, metavar="SECONDS", help="wait for a slower process (default: 7200)"
    )
    group.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Gathers everything wrong with the flags and raises once.

    Raises:
        ValueError: One line a problem.
    """
    problems = []
    for name, interval in NUMBERS.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if not interval.holds(value):
                problems.append(f"--{name.replace('_', '-')} {value}: give a number {interval}")
    if not args.model and not args.resume:
        problems.append("--model is missing: name a model of this zoo or of timm, or give --resume FILE")
    if args.model and not timm.is_model(args.model):
        problems.append(f"--model {args.model}: neither this zoo nor timm knows it; near: {near_models(args.model)}")
    if args.resume and args.pretrained:
        problems.append(f"--resume {args.resume} and --pretrained exclude each other")
    if args.ema and not args.resume:
        problems.append("--ema needs --resume, the checkpoint that holds the EMA")
    for name, suffix in (("save_features", ".npz"), ("results_file", ".json")):
        path = getattr(args, name)
        if path and (path.suffix != suffix or not path.parent.is_dir() or path.is_dir()):
            flag = f"--{name.replace('_', '-')}"
            problems.append(f"{flag} {path}: give a file that ends in {suffix}, in a folder that is there")
        elif path and (reason := why_unwritable(path)):
            problems.append(f"--{name.replace('_', '-')} {path} cannot be written ({reason}): give another file")
    if problems:
        raise ValueError("\n".join(problems))


# --------------------------------------------------------------------------------------------------- model and features


def build_model(args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The model with its weights, and the side of its images in pixels.

    Raises:
        CheckpointError: If the weights are not those of this model.
        ModelError: If there is no such model, or it cannot be built.
    """
    torch.manual_seed(args.seed)
    remedies = remedy_options(args.remedy, args.remedy_kwargs)
    size = args.input_size
    if args.resume:
        checkpoint = read_checkpoint(args.resume)
        size = size or trained_with(checkpoint).get("input_size")
        model = model_from_checkpoint(
            checkpoint,
            source=args.resume,
            name=args.model,
            weights="model_ema" if args.ema else "model",
            input_size=size,
            model_kwargs=args.model_kwargs,
            remedies=remedies or None,
        )
    else:
        model = create_model(
            args.model, input_size=size, pretrained=args.pretrained, model_kwargs=args.model_kwargs, remedies=remedies
        )
    return model.eval(), size or resolve_data_config({}, model=model)["input_size"][-1]


def feature_of(model: nn.Module, images: Tensor, feature: str) -> Tensor:
    """The feature of each image, after the model's last norm: shape (B, C).

    Args:
        model: Of timm.
        images: Shape (B, 3, H, W).
        feature: One of ``FEATURES``; see ``--feature``.

    Raises:
        ValueError: If the model has no such feature.
    """
    tokens = model.forward_features(images)
    if feature == "pre_logits":
        return model.forward_head(tokens, pre_logits=True)
    if tokens.ndim == 4 and feature == "mean":
        return tokens.mean((1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3))
    prefix = getattr(model, "num_prefix_tokens", None)
    if feature == "mean" and tokens.ndim == 3 and prefix is not None:
        return tokens[:, prefix:].mean(1)
    if feature == "cls" and tokens.ndim == 3 and prefix and getattr(model, "cls_token", None) is not None:
        return tokens[:, 0]
    raise ValueError(f"--feature {feature}: this model has none such: take pre_logits")


def check_model(args: argparse.Namespace, model: nn.Module, size: int) -> None:
    """Passes one empty image through the model, before any image is read.

    Raises:
        ValueError: If it gives no feature of it.
    """
    try:
        with torch.inference_mode():
            found = feature_of(model, torch.zeros(1, 3, size, size), args.feature)
    except Exception as error:  # a model's complaint can be of any kind
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"--model {args.model or args.resume}, RGB images of {size} pixels: {reason}") from error
    if found.ndim != 2:
        raise ValueError(f"--feature {args.feature}: a vector for each image is wanted, the model gives {found.shape}")


class Indexed(Dataset):
    """Items (image, label, index); the index is the image's position in the data set."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.remote = getattr(dataset, "remote", None)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return *self.dataset[index], index

    def __len__(self) -> int:
        return len(self.dataset)


def build_loaders(args: argparse.Namespace, size: int, config: dict, world: World) -> tuple[list[DataLoader], int]:
    """This rank's share of the training and evaluation images, all transformed as in evaluation; number of classes."""
    options = DataOptions.from_args(argparse.Namespace(**(vars(args) | {"input_size": size})))
    transform = build_transform(False, options, config)
    count_classes(options)  # explains what is wrong with the classes
    loaders = []
    for is_train in (True, False):
        dataset, classes = build_dataset(is_train, options, config, transform=transform)
        dataset = Indexed(dataset)
        _, sampler = build_samplers(
            None, dataset, world_size=world.world_size, rank=world.rank, repeated_aug=False, seed=args.seed
        )
        loaders.append(
            build_loader(
                dataset,
                sampler,
                batch_size=args.batch_size,
                num_workers=utils.loader_processes(args.num_workers),
                pin_memory=world.device.type == "cuda",
                drop_last=False,
            )
        )
        start_workers(loaders[-1])
    return loaders, classes


@torch.inference_mode()
def extract(args: argparse.Namespace, model: nn.Module, loader: DataLoader, world: World, name: str) -> Features:
    """Features of all images in the data set's order, on every rank; each image is one row, whichever rank computed it.

    Raises:
        ValueError: If a feature is not finite.
    """
    total, mine = len(loader.dataset), loader.sampler.num_valid_samples  # the sampler pads, with images of other ranks
    values, dtype = None, getattr(torch, args.amp_dtype)
    labels = torch.zeros(total, dtype=torch.int64, device=world.device)
    done = 0
    with progress(world, mine, f"{name} features") as bar:
        for images, targets, rows in loader:
            keep = min(len(images), mine - done)
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                found = feature_of(model, images.to(world.device, non_blocking=True), args.feature)[:keep]
            if values is None:
                width, kind = found.shape[1], getattr(torch, args.bank_dtype)
                values = torch.zeros(total, width, dtype=kind, device=world.device)
            rows = rows[:keep].to(world.device)
            values[rows] = found.to(values.dtype)
            labels[rows] = targets[:keep].to(world.device)
            done += keep
            bar.update(keep)
    if world.distributed:  # a row is zero on all ranks but one: the sum is that row, to the bit
        dist.all_reduce(values)
        dist.all_reduce(labels)
    if not all(block.isfinite().all() for block in values.split(2**16)):
        raise ValueError(f"a feature of the {name} images is not finite: {not_finite_advice(args)}")
    return Features(values, labels)


def not_finite_advice(args: argparse.Namespace) -> str:
    """The way out where features are not finite: more precision, as long as there is more."""
    low = [flag for flag in ("bank_dtype", "amp_dtype") if getattr(args, flag) != "float32"]
    if low:
        return f"take {' and '.join('--' + flag.replace('_', '-') for flag in low)} float32"
    return (
        "they are computed in float32, so the weights themselves are not finite or too large, as after a training run "
        "that diverged: give another checkpoint"
    )


def progress(world: World, total: int, what: str) -> tqdm:
    """Rank 0's progress bar, with the time left; in a file, a line every half minute."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, unit="image", disable=not world.is_main, mininterval=seconds)


# --------------------------------------------------------------------------------------------------------------- probes


def run_knn(args: argparse.Namespace, train: Features, val: Features, classes: int, world: World) -> list[dict]:
    """A row of results for each ``--k``; those above the number of training images are left out."""
    ks = sorted({k for k in args.k if k <= len(train.labels)})
    if left_out := sorted(set(args.k) - set(ks)):
        say(world, f"--k {' '.join(map(str, left_out))}: left out, there are {len(train.labels)} training images")
    if not ks:
        return []
    with progress(world, math.ceil(len(val.labels) / world.world_size), "k-NN") as bar:
        correct = knn_correct(
            train,
            val,
            ks,
            classes=classes,
            temperature=args.temperature,
            rank=world.rank,
            world_size=world.world_size,
            after_block=bar.update,
        )
    if world.distributed:
        dist.all_reduce(correct)
    percent = 100 * correct.cpu().double() / len(val.labels)
    return [{"k": k, "top1": top1, "top5": top5} for k, (top1, top5) in zip(ks, percent.tolist(), strict=True)]


def choose_l2(
    args: argparse.Namespace, train: Features, classes: int, world: World
) -> tuple[float, list[dict[str, Any]]]:
    """The penalty with the highest accuracy on held-out training images, and the results of every penalty.

    The ranks share the penalties. One process makes a whole fit, so the results are the same for any number of ranks.

    Raises:
        DataError: If a class has a single training image.
    """
    candidates = sorted(set(args.l2), reverse=True)  # of equally good ones the strongest is taken
    if len(candidates) == 1:
        return candidates[0], []
    try:
        fit_on, held_out = split_by_class(train.labels.cpu().numpy(), args.held_out, args.seed)
    except ValueError as error:
        raise DataError(f"--held-out {args.held_out}: {error}; give one --l2, which needs no choice") from error
    fit_on, held_out = (torch.tensor(rows, device=world.device) for rows in (fit_on, held_out))
    found = torch.zeros(len(candidates), 2, dtype=torch.int64, device=world.device)  # right answers, iterations
    mine, began = range(world.rank, len(candidates), world.world_size), time.monotonic()
    for done, position in enumerate(mine, start=1):
        fitted = fit_linear(train, fit_on, classes=classes, l2=candidates[position], iterations=args.linear_iterations)
        blocks = held_out.split(ROWS)
        correct = sum(count_correct(fitted.logits(train.values[b]), train.labels[b])[0] for b in blocks)
        found[position, 0], found[position, 1] = correct, fitted.iterations
        left = (time.monotonic() - began) / done * (len(mine) - done + 1)  # + 1: the last fit, on all images
        say(world, f"linear probe, fit {done} of {len(mine) + 1}  eta: {timedelta(seconds=round(left))}")
    if world.distributed:
        dist.all_reduce(found)
    sweep = [
        {"l2": l2, "held_out_top1": 100 * correct / len(held_out), "iterations": iterations}
        for l2, (correct, iterations) in zip(candidates, found.tolist(), strict=True)
    ]
    return max(sweep, key=lambda row: row["held_out_top1"])["l2"], sweep


def run_linear(
    args: argparse.Namespace, train: Features, val: Features, classes: int, world: World
) -> tuple[dict[str, Any], Tensor] | None:
    """Results and logits of the evaluation images on rank 0; None on the others, which have nothing left to do."""
    l2, sweep = choose_l2(args, train, classes, world)
    if not world.is_main:
        return None
    if sweep and l2 in (min(args.l2), max(args.l2)):
        say(world, f"note: the best --l2, {l2:g}, is at the end of the sweep: try some beyond it")
    everything = torch.arange(len(train.labels), device=world.device)
    fitted = fit_linear(train, everything, classes=classes, l2=l2, iterations=args.linear_iterations)
    if max(fitted.iterations, *(row["iterations"] for row in sweep), 0) >= args.linear_iterations:
        say(world, f"note: a linear probe had not converged after --linear-iterations {args.linear_iterations}")
    logits = torch.cat([fitted.logits(block) for block in val.values.split(ROWS)])
    top1, top5 = (100 * count / len(val.labels) for count in count_correct(logits, val.labels).tolist())
    return {"l2": l2, "top1": top1, "top5": top5, "iterations": fitted.iterations, "sweep": sweep}, logits


# ------------------------------------------------------------------------------------------------------------------ run


def say(world: World, line: str) -> None:
    """Prints on rank 0."""
    if world.is_main:
        tqdm.write(line)


def main(args: argparse.Namespace) -> None:
    """Builds, extracts, probes, prints and writes.

    Raises:
        ValueError: With one sentence about the flag, the model or the data at fault.
    """
    check_args(args)
    world = utils.this_process(args.device)
    model, size = build_model(args)
    check_model(args, model, size)
    if not args.resume and not args.pretrained:
        say(world, "note: the model has random weights: give --resume or --pretrained")
    # Loader processes are forked before this one has threads, as in main.py.
    loaders, classes = build_loaders(args, size, resolve_data_config({}, model=model), world)
    model.to(world.device)
    with explain_images(), utils.process_group(args.device, args.dist_url, args.dist_timeout):
        train, val = (
            extract(args, model, loader, world, name) for loader, name in zip(loaders, ("train", "val"), strict=True)
        )
        width, held = train.values.shape[1], train.values.nbytes + val.values.nbytes
        images = f"{len(train.labels):,} training and {len(val.labels):,} evaluation images of {classes} classes"
        memory = f"{held / 2**20:,.1f} MiB of memory in each process"
        say(world, f"features: {args.feature}, {images}, {width} {args.bank_dtype} numbers each: {memory}")
        results = describe(args, model, size, train, val, classes)
        results["knn"] = run_knn(args, train, val, classes, world)
        linear = None if args.no_linear else run_linear(args, train, val, classes, world)
        if world.is_main:
            results["linear"] = linear and linear[0]
            write(args, results, train, val, linear and linear[1])


def describe(
    args: argparse.Namespace, model: nn.Module, size: int, train: Features, val: Features, classes: int
) -> dict[str, Any]:
    """What a reader needs to reproduce the numbers."""
    return {
        "model": model.pretrained_cfg.get("architecture") or args.model,
        "weights": args.resume or ("pretrained" if args.pretrained else "random"),
        "ema": args.ema,
        "remedy": remedies_of(model),
        "feature": args.feature,
        "data_set": args.data_set,
        "data_path": args.data_path,
        "input_size": size,
        "classes": classes,
        "train_images": len(train.labels),
        "val_images": len(val.labels),
        "dim": train.values.shape[1],
        "bank_dtype": args.bank_dtype,
        "amp_dtype": args.amp_dtype,
        "temperature": args.temperature,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "command": " ".join(sys.argv),
    }


def write(
    args: argparse.Namespace, results: dict[str, Any], train: Features, val: Features, logits: Tensor | None
) -> None:
    """Prints the table; writes ``--results-file`` and ``--save-features``."""
    rows = [(f"k-NN, k = {row['k']}", row) for row in results["knn"]]
    if results["linear"]:
        rows.append((f"linear, l2 = {results['linear']['l2']:g}", results["linear"]))
    cells = [(name, f"{row['top1']:.3f}", f"{row['top5']:.3f}") for name, row in rows]
    print(markdown.table(("probe", "top-1", "top-5"), cells), flush=True)
    if args.results_file:
        args.results_file.write_text(json.dumps(results, indent=1, default=str) + "\n")
        print(f"wrote {args.results_file}")
    if args.save_features:
        arrays = {
            f"{split}_{name}": tensor.cpu().numpy()
            for split, features in (("train", train), ("val", val))
            for name, tensor in (("features", features.values), ("labels", features.labels))
        }
        if logits is not None:
            arrays["linear_logits"] = logits.cpu().numpy()
        np.savez(args.save_features, **arrays)
        print(f"wrote {args.save_features}")


def cli() -> int:
    """Command line; see the head of this file. Returns the exit code."""
    args = get_parser().parse_args()
    return entry.explained(lambda: main(args), ValueError, OSError, SetupError)


if __name__ == "__main__":
    entry.run(cli)
