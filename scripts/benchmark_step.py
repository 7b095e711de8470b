"""Where a training step's time goes, as the recipe runs it, and how two processes compare with one.

    python scripts/benchmark_step.py                          # attnscale_small_12, batch 64, 2 threads
    python scripts/benchmark_step.py --quick
    python scripts/benchmark_step.py --device cuda            # batch 256, 50 steps after 5 to warm up
    python scripts/benchmark_step.py --only scaling           # needs two free cores, or with --device cuda two GPUs

The steps are those of ``engine.train_one_epoch`` with mixup, autocast, loss scaling, AdamW, the EMA, meters
and console lines; hooks record the time between their parts. Batches are random bytes made in advance: data loading is
not included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

import build
import datasets
import engine
import fastload
import options
import utils
from scripts import markdown
from scripts.workload import workload

NUM_CLASSES = 1000
FORWARD_BACKWARD = ("forward", "backward")


class Timeline:
    """Adds up the time of each part, from the last stamp to its own; on a GPU, waits for the device first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def stamp(self, ended: str, *hook_arguments: Any) -> None:
        """Ends the part ``ended``; further arguments, which hooks pass, are ignored."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[ended] += now - self.last
        self.last = now

    def watch(self, trainer: engine.Trainer) -> None:
        """Adds hooks to every part of ``trainer`` that takes them."""

        def around(module: nn.Module, before: str, after: str) -> None:
            module.register_forward_pre_hook(lambda *inputs: self.stamp(before))
            module.register_forward_hook(lambda *inputs: self.stamp(after))

        if trainer.prepare is not None:
            around(trainer.prepare, "copy to the device", "normalisation, erasing")
        around(trainer.bare_model, "mixup", "forward")
        around(trainer.criterion, "forward", "loss")
        trainer.optimizer.register_step_pre_hook(partial(self.stamp, "backward"))
        trainer.optimizer.register_step_post_hook(partial(self.stamp, "optimizer"))


class TimedEma(engine.Ema):
    """The EMA with stamps, since it has no hooks."""

    timeline: Timeline | None = None

    def update(self, model: nn.Module, step: int | None = None) -> None:
        if self.timeline is not None:
            self.timeline.stamp("scaler, zero_grad")
        super().update(model, step)
        if self.timeline is not None:
            self.timeline.stamp("EMA")


def build_step(world: utils.World, *flags: str) -> tuple[engine.Trainer, list[tuple[Tensor, Tensor]]]:
    """The recipe's trainer with ``flags``, and two batches of random bytes in the loader's form."""
    args = options.get_args_parser().parse_args(["--num-classes", str(NUM_CLASSES), *flags])
    model = build.build_model(args, NUM_CLASSES).to(world.device)
    ema = TimedEma(model, decay=args.model_ema_decay)
    amp_dtype = build.amp_dtype(args, world.device)
    prepare = fastload.build_device_transform(
        datasets.DataOptions.from_args(args), resolve_data_config({}, model=model), world.device
    )
    trainer = build.build_trainer(args, build.Start(), model, ema, world, amp_dtype, prepare)
    shape = (args.batch_size, args.input_size, args.input_size, 3)
    batches = [(torch.randint(256, shape, dtype=torch.uint8), torch.randint(NUM_CLASSES, shape[:1])) for _ in range(2)]
    if world.device.type == "cuda":
        batches = [(images.pin_memory(), targets.pin_memory()) for images, targets in batches]
    return trainer, batches


def run_steps(trainer: engine.Trainer, batches: list[tuple[Tensor, Tensor]], steps: int, **hooks: Any) -> float:
    """Seconds of ``steps`` steps of an epoch, console lines every tenth included."""
    loader = [batches[i % len(batches)] for i in range(steps)]
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    began = time.perf_counter()
    engine.train_one_epoch(trainer, loader, 0, meters=utils.Meters(trainer.device), **hooks)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - began


# --------------------------------------------------------------------------------------------------------------- tables


def step_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of every part of a step; one row a part.

    Args:
        args: Reads ``quick``, ``device``; where present also ``model``, ``batch_size``, ``steps``, ``threads`` (the
            first).
    """
    device = torch.device(args.device)
    if threads := getattr(args, "threads", None):
        torch.set_num_threads(threads[0])
    work = workload("step", device, quick=args.quick)
    batch_size = getattr(args, "batch_size", None) or work.batch_size
    steps = getattr(args, "steps", None) or work.steps
    flags = ["--model", getattr(args, "model", None) or "attnscale_small_12", "--batch-size", str(batch_size)]
    trainer, batches = build_step(utils.World(0, 0, 1, device), *flags)
    run_steps(trainer, batches, work.warmup)  # the first step makes the optimizer's state and the thread pools
    timeline = Timeline(device)
    timeline.watch(trainer)
    trainer.ema.timeline = timeline

    def seed_step(step: int) -> None:
        timeline.stamp("loop")
        utils.seed_everything(0, 0, 0, step)
        timeline.stamp("seeds")

    timeline.last = time.perf_counter()
    run_steps(
        trainer, batches, steps, seed_step=seed_step, after_step=partial(timeline.stamp, "meters, finiteness, console")
    )
    timeline.stamp("loop")
    total = sum(timeline.seconds.values())
    rest = total - sum(timeline.seconds[name] for name in FORWARD_BACKWARD)
    rows = [
        dict(part=name, ms=1e3 * seconds / steps, share=seconds / total)
        for name, seconds in sorted(timeline.seconds.items(), key=lambda item: -item[1])
    ]
    rows.append(dict(part="all but forward and backward", ms=1e3 * rest / steps, share=rest / total))
    setting = dict(model=flags[1], batch_size=batch_size, steps=steps, threads=torch.get_num_threads())
    rows = [row | setting for row in rows]
    print(format_step(rows), flush=True)
    return rows


def scaling_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Images per second of two processes of one thread each, relative to one such process; one row.

    Args:
        args: As for :func:`step_table`; ``rounds`` of one and two processes in turns.
    """
    rounds = getattr(args, "rounds", None) or (1 if args.quick else 5)
    work = workload("scaling", args.device, quick=args.quick)
    batch_size = getattr(args, "batch_size", None) or work.batch_size
    steps = getattr(args, "steps", None) or work.steps
    model = getattr(args, "model", None) or "attnscale_small_12"
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for processes, measured in rates.items():
            measured.append(_rate_of(processes, args.device, model, batch_size, steps))
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    row = dict(
        model=model,
        batch_size=batch_size,
        images_per_s_1=statistics.median(rates[1]),
        images_per_s_2=statistics.median(rates[2]),
        ratio=statistics.median(ratios),
        ratio_rounds=ratios,
    )
    print(
        f"\n{model}, batch {batch_size} a process, one thread each: {row['images_per_s_1']:.2f} images/s with one "
        f"process, {row['images_per_s_2']:.2f} with two: {row['ratio']:.2f} times "
        f"({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)",
        flush=True,
    )
    return [row]


def _rate_of(processes: int, device: str, model: str, batch_size: int, steps: int) -> float:
    """Images per second of a run of its own with that many processes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rate"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        worker = [str(Path(__file__)), "--worker", str(result), "--device", device, "--model", model]
        setting = ["--batch-size", str(batch_size), "--steps", str(steps)]
        subprocess.run([*launcher, *worker, *setting], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return float(result.read_text())


def _work(args: argparse.Namespace) -> None:
    """One process of :func:`_rate_of`; rank 0 writes the rate of all."""
    with utils.process_group(args.device) as world:
        trainer, batches = build_step(world, "--model", args.model, "--batch-size", str(args.batch_size))
        run_steps(trainer, batches, workload("scaling", world.device).warmup)
        seconds = run_steps(trainer, batches, args.steps)
        if world.is_main:
            args.worker.write_text(str(world.world_size * args.batch_size * args.steps / seconds))


def format_step(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    first = rows[0]
    setting = f"\n{first['model']}, batch {first['batch_size']}, {first['steps']} steps, {first['threads']} thread(s)\n"
    cells = [[row["part"], f"{row['ms']:.1f}", f"{row['share']:.2%}"] for row in rows]
    return f"{setting}\n{markdown.table(('part of a step', 'ms', 'share'), cells)}"


TABLES = {"step": step_table, "scaling": scaling_table}


def main() -> None:
    """Measures alone, without the other tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, help="one of the two tables")
    parser.add_argument("--model", default="attnscale_small_12", metavar="NAME")
    parser.add_argument(
        "-b", "--batch-size", type=int, help="default 64 in one process, 16 in each of two; on CUDA 256"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, help="of one and two processes in turns; default 5")
    parser.add_argument("--threads", type=int, nargs="+", help="of the one process; default: torch's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small batches, few steps")
    parser.add_argument("--results-file", type=entry.user_path, metavar="JSON")
    parser.add_argument("--worker", type=entry.user_path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _work(args)
        return
    results = {name: table(args) for name, table in TABLES.items() if args.only in (None, name)}
    if args.results_file:
        args.results_file.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    entry.run(main)
