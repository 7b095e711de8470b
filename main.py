"""Trains and evaluates the models of this repository: parse the arguments, build, then fit or evaluate.

    torchrun --nproc_per_node=2 main.py --auto_reload --model attnscale_small_12 --batch-size 512 \
        --data-set IMNET --data-path /data/imagenet --output_dir logs/attnscale_small_12
    python main.py --model attnscale_small_12 --data-set IMNET --data-path /data/imagenet --eval --resume ckpt.pth
    python main.py --help
"""

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import argparse
import json
import logging
import sys

import torch
from torch import nn

import build
import datasets
import engine
import models
import oversmoothing
import preflight
import reporting
import utils
from fit import evaluate_with_ema, fit
from options import ArgumentError, check_args, get_args_parser
from oversmoothing.analysis.results import json_ready
from oversmoothing.weights import CheckpointError, ModelError
from readers.loader import explain_loader_errors, sentence_of
from utils import World

_logger = logging.getLogger("main")


def main(args: argparse.Namespace) -> None:
    """One run, start to end."""
    check_args(args)
    if args.list_models:
        print("\n".join(models.list_models()))
        return
    if args.list_remedies:
        for remedy in map(oversmoothing.describe, oversmoothing.list_remedies()):
            print(f"{remedy['name']:16}{remedy['formula']}   [{remedy['source']}]")
        return
    build.check_model_names(args)
    world = utils.this_process(args.device)
    sketch = preflight.check_flags(args, world.world_size)
    utils.setup_logging(world.rank)
    about = [utils.describe_environment(world)]
    _logger.info(about[-1])
    _logger.info(f"arguments: {json.dumps(vars(args), default=str)}")
    output_dir = None if args.eval or args.throughput else args.output_dir
    with explain_loader_errors():
        start = build.Start() if args.auto_reload else build.find_start(args)
        # Workers are forked before this process has threads: a fork copies the locks that threads hold.
        loaders = None if args.throughput else build.build_loaders(args, sketch, world)
        with (
            utils.process_group(args.device, args.dist_url, args.dist_timeout),
            utils.claimed_folder(output_dir, world, timeout_s=min(60, args.dist_timeout / 2)),
        ):
            start = build.find_start(args) if args.auto_reload else start
            run(args, start, loaders, world, about)


def run(
    args: argparse.Namespace, start: build.Start, loaders: build.Loaders | None, world: World, about: list[str]
) -> None:
    """What the processes do together: ``--throughput``, ``--eval`` or training."""
    utils.seed_everything(args.seed)
    model = build.build_model(args, build.num_classes(args, start), start).to(world.device)
    about.append(reporting.describe_model(args.model, model, args.input_size, world.device))
    _logger.info(about[-1])
    start = build.load_start(args, start, model, world)
    amp_dtype = build.amp_dtype(args, world.device)
    _logger.info(f"device: {world.device} (--device {args.device}), precision: {str(amp_dtype).removeprefix('torch.')}")
    if args.throughput:
        measure_throughput(args, model, world, amp_dtype)
        return
    ema = build.build_ema(args, start, model)
    if args.eval:
        stats = evaluate_with_ema(args, model, ema, loaders.val, world, amp_dtype, prepare=loaders.prepare_eval)
        _logger.info(f"results: {json.dumps(json_ready(stats))}")
        return
    trainer = build.build_trainer(args, start, model, ema, world, amp_dtype, loaders.prepare)
    build.release_weights(start)
    fit(args, start, trainer, loaders, world, about)


def measure_throughput(args: argparse.Namespace, model: nn.Module, world: World, amp_dtype: torch.dtype) -> None:
    """Prints images/s of the forward pass on random images."""
    if args.torchcompile:
        model.compile(mode=args.torchcompile)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=world.device)
    rate = engine.throughput(model, images, amp_dtype=amp_dtype)
    setting = f"batch {args.batch_size}, {args.input_size} px, {amp_dtype}, one process"
    _logger.info(f"throughput of {args.model}: {rate:.1f} images/s ({setting})")


def cli() -> int:
    """Runs :func:`main`; turns what a user can fix into one clear line and an exit code (see ``entry.EXIT_*``)."""
    rank = entry.launcher_rank()
    try:
        main(get_args_parser().parse_args())
    except utils.Preempted as stopped:
        print(f"[rank {rank}] {stopped}", flush=True)
        return entry.EXIT_PREEMPTED
    except KeyboardInterrupt:
        print(f"[rank {rank}] interrupted", file=sys.stderr, flush=True)
        return entry.EXIT_INTERRUPTED
    except (ArgumentError, CheckpointError, ModelError, datasets.DataError, utils.SetupError) as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr, flush=True)
        return entry.EXIT_BAD_INPUT
    except engine.NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return entry.EXIT_NON_FINITE
    except torch.OutOfMemoryError as error:
        print(
            f"[rank {rank}] error: the GPU's memory does not hold a step: lower --batch-size (--grad-accum keeps the "
            "effective batch), or take --grad-checkpointing or --amp-dtype bfloat16 "
            f"({str(error).partition('. GPU')[0].strip()})",
            file=sys.stderr,
            flush=True,
        )
        return entry.EXIT_BAD_INPUT
    except RuntimeError as error:
        lost = utils.lost_peer(error)
        if lost is None:
            raise
        print(
            f"[rank {rank}] lost another process of this run: it ended or was silent for --dist-timeout seconds, look "
            f"for its error above; the same command with --auto_reload continues from the last checkpoint ({lost})",
            file=sys.stderr,
            flush=True,
        )
        return entry.EXIT_LOST_PEER
    return 0


if __name__ == "__main__":
    entry.run(cli)
