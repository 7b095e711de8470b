"""Checks this repository on a new machine's GPU: one command, at most nine minutes on one GPU, no network, no data.

    python scripts/check_gpu.py                              # everything; the results also go to check_gpu.json
    python scripts/check_gpu.py --only compiled              # one section, with all the time that it needs
    python scripts/check_gpu.py --only parity speed chunk
    python scripts/check_gpu.py --device cpu --quick         # the same code, small; its times mean nothing

Every number is *held* (it meets its aim), *missed* (the line then names the flag or the constant to change) or
*measured* (there is no aim). Sections run one after another, each with a time limit and, on a GPU, in its own process:
if one fails or hangs, only its results are lost. Every result is at once in check_gpu.jsonl, too, so nothing is lost if
this program is killed. The exit code is 1 if a check of correctness was missed or a section failed.
"""

import argparse
import copy
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
import fastload
import oversmoothing
import utils
from oversmoothing.fused import talking_heads
from scripts.benchmark import Runner, build, describe_machine
from scripts.benchmark_data import compare_loaders, make_photographs, recipe_of
from scripts.benchmark_step import build_step, run_steps, step_table

ROOT = Path(__file__).resolve().parents[1]
DEIT = ("deit_small_patch16_224", "attnscale_small_12", "featscale_small_12", "attnfeatscale_small_12")
CAIT = ("cait_s24_224", "attnscale_cait_S24_224", "featscale_cait_S24_224")
GRACE = 30  # seconds for a section to be imported, and to end by itself after its limit
WORTHWHILE = 20  # seconds: with less time left, a longer section is not begun
QUICK = dict(embed_dim=48, num_heads=3, depth=3, patch_size=8)  # of the same kinds, at 32 pixels


class Report:
    """Writes results as lines of JSON: those before a crash are kept."""

    def __init__(self, path: Path, section: str) -> None:
        self.path, self.section = path, section

    def add(
        self, name: str, value: float | str, unit: str = "", *, at_most: float | None = None,
        at_least: float | None = None, change: str = "", correctness: bool = False,
    ) -> None:  # fmt: skip
        """Adds a measured value; with an aim it is held or missed, and ``change`` says what to do if missed."""
        held = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        aim = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}" if at_least is not None else ""
        verdict = "measured" if not aim else "held" if held else "missed"
        line = dict(section=self.section, name=name, value=value, unit=unit, aim=aim, verdict=verdict)
        self.write(line | dict(change=change if verdict == "missed" else "", correctness=correctness))

    def left_out(self, reason: str) -> None:
        """Notes that the section did not run, or not to its end, for lack of time."""
        change = f"its results are not complete; run it alone: --only {self.section}"
        line = dict(section=self.section, name=reason, value="", unit="", aim="", verdict="left out")
        self.write(line | dict(change=change, correctness=False))

    def failed(self, reason: str, details: str = "") -> None:
        """Notes that the section did not reach its end; ``details`` are kept, and shown on standard error."""
        change = "its results so far are above; run it alone: --only " + self.section
        line = dict(section=self.section, name="section", value=reason, unit="", aim="", verdict="failed")
        self.write(line | dict(change=change, correctness=True, details=details))
        print(details, file=sys.stderr, end="", flush=True)

    def write(self, line: dict[str, Any]) -> None:
        """Appends it and shows it."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(format_line(line), flush=True)


def format_line(line: dict[str, Any]) -> str:
    """One result in columns."""
    value = f"{line['value']:.4g}" if isinstance(line["value"], float) else str(line["value"])
    text = f"{line['verdict']:9}{line['section']:12}{line['name']:62}{value + ' ' + line['unit']:>16}  {line['aim']}"
    return text.rstrip() + (f"\n{'':9}-> {line['change']}" if line["change"] else "")


class Setting(argparse.Namespace):
    """What sections read: ``device``, ``quick``."""

    device: torch.device
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Waits until the device has finished its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def world(self) -> utils.World:
        """A run of one process on the device."""
        return utils.World(0, 0, 1, self.device)

    def build(self, name: str) -> nn.Module:
        """The model with random lambda, of full size on a GPU; with ``--quick`` small."""
        torch.manual_seed(0)
        if not self.quick:
            return build(name, None, self.device)
        return build(name, 32, self.device, **QUICK)

    def time(self, runners: list[Runner], phase: str, steps: int, rounds: int = 3) -> list[tuple[float, float]]:
        """(step, host) milliseconds of each runner's fastest round; they take turns, after a warm-up round."""
        best = [(math.inf, math.inf)] * len(runners)
        for number in range(rounds + 1):
            for i, runner in enumerate(runners):
                step, repeats = getattr(runner, phase), steps if number else 2
                self.wait()
                start = time.perf_counter()
                for _ in range(repeats):
                    step()
                host = time.perf_counter() - start
                self.wait()
                if number:
                    took = (1e3 * (time.perf_counter() - start) / repeats, 1e3 * host / repeats)
                    best[i] = tuple(map(min, best[i], took))
        return best

    def peak_gib(self, runner: Runner) -> float:
        """Memory of a training step at its peak."""
        if not self.on_gpu:
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        runner.train()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**30


# ------------------------------------------------------------------------------------------------------------- sections


def environment(setting: Setting, report: Report) -> None:
    """Versions, the card, and the collectives of a run in a group of one."""
    for name, value in describe_machine(setting.device).items():
        report.add(name, str(value))
    store = dist.PrefixStore("check", dist.HashStore())
    if setting.on_gpu:
        report.add("capability", "{}.{}".format(*torch.cuda.get_device_capability(setting.device)))
        report.add("memory", torch.cuda.get_device_properties(setting.device).total_memory / 2**30, "GiB")
        report.add("CUDA of torch", str(torch.version.cuda))
        report.add("cuDNN", str(torch.backends.cudnn.version()))
        report.add("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        report.add("driver", _driver())
        torch.cuda.set_device(setting.device)
        utils._claim_gpu(setting.world(), store)
    backend = "nccl" if setting.on_gpu else "gloo"
    device_id = setting.device if setting.on_gpu else None
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device_id)
    gathered = [None]
    for value in (ValueError("x"), {"a": 1}):
        dist.all_gather_object(gathered, value)
    for tensor in (torch.ones((), dtype=torch.int64), torch.ones(2, 2, dtype=torch.float64)):
        dist.all_reduce(tensor.to(setting.device), op=dist.ReduceOp.MIN)
    group = dist.new_group(backend="gloo")
    dist.all_reduce(torch.tensor([0]), group=group, async_op=True).wait()
    wrapped = DistributedDataParallel(nn.Linear(8, 8).to(setting.device), gradient_as_bucket_view=True)
    wrapped(torch.ones(2, 8, device=setting.device)).sum().backward()
    setting.wait()
    dist.destroy_process_group()
    report.add(f"collectives of a run, {backend} group of one (1: done)", 1.0, at_least=1, correctness=True)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or "?"
    except (OSError, subprocess.TimeoutExpired):
        return "?"


def parity(setting: Setting, report: Report) -> None:
    """Loss and gradient of the fast forms in three precisions against the definition in float64 on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # Relative error of the whole gradient: rounding of each precision, over a network's depth.
    limits = {None: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
    names = ("attnscale_small_12", "featscale_small_12", "attnfeatscale_small_12", "attnscale_cait_XXS24_224")
    for name in names:
        model = setting.build(name).cpu()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "gamma" in key:
                    parameter.fill_(0.1)
        side = model.patch_embed.img_size[0]
        images, targets = torch.randn(4, 3, side, side), torch.randint(model.num_classes, (4,))
        dense = oversmoothing.set_fused(copy.deepcopy(model), False).double()
        exact = _gradient(dense, images.double(), targets, None)
        for dtype, limit in limits.items():
            fused = copy.deepcopy(model).to(setting.device)
            found = _gradient(fused, images.to(setting.device), targets.to(setting.device), dtype)
            plain = oversmoothing.set_fused(fused, False)
            beside = _gradient(plain, images.to(setting.device), targets.to(setting.device), dtype)
            error, of_definition = (float((g - exact).norm() / exact.norm()) for g in (found, beside))
            precision = "float32" if dtype is None else str(dtype)[6:]
            # Up to 1.5 times the definition's own error in this precision is good enough.
            limit = max(limit, 1.5 * of_definition)
            report.add(
                f"{name}, {precision}: gradient", error, at_most=limit, correctness=True,
                change=f"--model-kwargs fused=False computes the definition (error {of_definition:.1e}); tell us",
            )  # fmt: skip


def _gradient(model: nn.Module, images: Tensor, targets: Tensor, dtype: torch.dtype | None) -> Tensor:
    model.train().zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype or torch.float32, enabled=dtype is not None):
        logits = model(images)
    (1024 * F.cross_entropy(logits if images.dtype == torch.float64 else logits.float(), targets)).backward()
    return torch.cat([p.grad.double().flatten().cpu() / 1024 for p in model.parameters()])


def waits(setting: Setting, report: Report) -> None:
    """The places at which the host waits for the device, in ten steps."""
    small = ("--model-kwargs", *(f"{k}={v}" for k, v in QUICK.items()), "--input-size", "32") if setting.quick else ()
    for extra in ((), ("--clip-grad", "1"), ("--amp-dtype", "bfloat16"), ("--model", "featscale_cait_XXS24_224")):
        flags = ["--model", "attnscale_small_12", "--batch-size", "16", *small, *extra]
        trainer, batches = build_step(setting.world(), *flags)
        meters, guard = utils.Meters(trainer.device), engine._FiniteLossGuard(trainer.device)
        trainer.model.train()

        def step(number: int, trainer=trainer, batches=batches, meters=meters, guard=guard) -> None:
            utils.seed_everything(0, 0, 0, number)
            images, targets = (batch.to(trainer.device, non_blocking=True) for batch in batches[number % 2])
            loss = engine.forward_backward(trainer, images, targets)
            engine.optimizer_step(trainer)
            guard.watch(loss, number)
            meters.update(len(images), loss=loss, lr=0.1)

        for number in range(3 if setting.on_gpu else 1):
            step(number)
        setting.wait()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if setting.on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            for number in range(10):
                step(number)
            if setting.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        # A frame of torch or timm may be named: then a line of this repository calls it.
        places = {f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)}
        report.add(
            f"places that wait for the device, {' '.join(extra) or 'default'}", float(len(places)), at_most=0,
            correctness=True, change="see " + ", ".join(sorted(places)),
        )  # fmt: skip


def speed(setting: Setting, report: Report) -> None:
    """Step, host and evaluation time and memory of the remedies against timm's plain models and the dense form."""
    deit = {32: 1.10, 64: 1.05, 256: 1.02} if setting.on_gpu else {2: None}
    cait = {32: None, 128: 0.75} if setting.on_gpu else {2: None}
    for names, batches, memory in ((DEIT, deit, 1.02), (CAIT, cait, 0.55)):
        models = [setting.build(name) for name in names]
        _compare_host(setting, report, names, models)
        models.append(oversmoothing.set_fused(setting.build(names[1]), False))  # and its definition
        for dtype in ("bfloat16", "float16") if setting.on_gpu else ("bfloat16",):
            for batch, aim in batches.items():
                _compare(setting, report, names, models, batch, dtype, aim, memory if setting.on_gpu else None)


def _compare_host(setting: Setting, report: Report, names: tuple[str, ...], models: list[nn.Module]) -> None:
    """The host's time: with two images the device always waits for it."""
    runners = [Runner(model, 2, setting.device, "bfloat16") for model in models]
    train = setting.time(runners, "train", 10 if setting.on_gpu else 1, 3 if setting.on_gpu else 1)
    report.add(f"{names[0]}, batch 2: host", train[0][1], "ms")
    for name, (_, host) in zip(names[1:], train[1:], strict=True):
        aim = (1.25 if name.startswith("attnfeat") else 1.15) if setting.on_gpu else None
        change = "nothing: small batches cost more; --torchcompile reduce-overhead takes the host out of the step"
        report.add(f"{name}, batch 2: host / timm's", host / train[0][1], at_most=aim, change=change)


def _compare(
    setting: Setting, report: Report, names: tuple[str, ...], models: list[nn.Module], batch: int, dtype: str,
    aim: float | None, memory: float | None,
) -> None:  # fmt: skip
    kind = "deit" if names is DEIT else "cait"
    runners = [Runner(model, batch, setting.device, dtype) for model in models]
    steps = 10 if setting.on_gpu else 1
    rounds = 3 if setting.on_gpu else 1
    try:
        runners[0].train()  # cuBLAS's workspaces, made now, are no model's
        peaks = [setting.peak_gib(runner) for runner in runners]
        train = setting.time(runners, "train", steps, rounds)
        evaluation = setting.time(runners, "infer", steps, rounds)
    except torch.OutOfMemoryError:
        return report.add(f"{kind}, {dtype}, batch {batch}", "out of memory")
    where = f"{dtype}, batch {batch}"
    report.add(f"{names[0]}, {where}: step", train[0][0], "ms")
    slow = "--torchcompile, or a larger --batch-size" if kind == "deit" else "talking_heads.CHUNK_BYTES (section chunk)"
    for i, name in enumerate(names[1:], start=1):
        one = None if aim is None or name.startswith("attnfeat") else aim
        report.add(f"{name}, {where}: step / timm's", train[i][0] / train[0][0], at_most=one, change=slow)
        report.add(f"{name}, {where}: evaluation / timm's", evaluation[i][0] / evaluation[0][0])
        if setting.on_gpu:
            limit = memory if aim is not None else None
            report.add(f"{name}, {where}: memory / timm's", peaks[i] / peaks[0], at_most=limit, change=slow)
    least = 1.5 if aim is not None and batch >= 128 else None
    report.add(f"{names[1]}, {where}: dense form / ours", train[-1][0] / train[1][0], at_least=least, change=slow)


def compiled(setting: Setting, report: Report) -> None:
    """The same under torch.compile, against the compiled plain model."""
    sizes = ((DEIT[:2], 256), (CAIT[:2], 32)) if setting.on_gpu else ()
    if not sizes:
        return report.add("not on a CPU: compiling takes too long", "left out")
    for names, batch in sizes:
        torch._dynamo.reset()  # or a second batch size would be compiled for any size
        runners = [Runner(setting.build(name), batch, setting.device, "bfloat16", "default") for name in names]
        start = time.perf_counter()
        for runner in runners:
            runner.train()
        setting.wait()
        report.add(f"{names[1]}, batch {batch}: compiling both", time.perf_counter() - start, "s")
        (plain, _), (ours, _) = setting.time(runners, "train", 10)
        report.add(
            f"{names[1]}, batch {batch}: step / compiled {names[0]}", ours / plain, at_most=1.02,
            change="leave --torchcompile out, or try --torchcompile reduce-overhead",
        )  # fmt: skip
        report.add(f"{names[1]}, batch {batch}: memory", setting.peak_gib(runners[1]), "GiB")


def kernels(setting: Setting, report: Report) -> None:
    """The kernels that take longest in a training step; attention's are among them."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if setting.on_gpu else [ProfilerActivity.CPU]
    for name in (DEIT[1], CAIT[1]):
        runner = Runner(setting.build(name), 8, setting.device, "bfloat16")
        runner.train()
        with profile(activities=activities) as profiler:
            runner.train()
            setting.wait()
        kind, took = (
            (DeviceType.CUDA, "self_device_time_total") if setting.on_gpu else (DeviceType.CPU, "self_cpu_time_total")
        )
        events = [event for event in profiler.key_averages() if event.device_type == kind]
        report.add(
            f"{name}: kinds of kernels", len(events), at_least=1,
            change="let this user read the driver's profiling counters; only this section needs them",
        )  # fmt: skip
        for event in sorted(events, key=attrgetter(took), reverse=True)[:12]:
            report.add(f"{name}: {event.count} x {event.key[:60]}", getattr(event, took) / 1e3, "ms")


def chunk(setting: Setting, report: Report) -> None:
    """The scratch buffer of the talking heads: the fastest size of a chunk."""
    constant = "CHUNK_BYTES" if setting.on_gpu else "CPU_CHUNK_BYTES"
    default = getattr(talking_heads, constant)
    sizes = (8, 16, 32, 64, 128, 256, 1024) if setting.on_gpu else (1, 2, 4)
    shapes = ((128, 8, 196, 48), (32, 8, 196, 48), (16, 8, 576, 48)) if setting.on_gpu else ((2, 4, 49, 8),)
    for shape in shapes:
        batch, heads, tokens, channels = shape
        dtype = torch.bfloat16 if setting.on_gpu else torch.float32
        qkv = torch.randn(batch, tokens, 3, heads, channels, device=setting.device, dtype=dtype)
        qkv = qkv.permute(2, 0, 3, 1, 4).requires_grad_()  # as the layer has it: a view of its projection
        sizes_of = ((heads, heads), (heads,), (heads, heads), (heads,))
        mixings = [torch.randn(*size, device=setting.device, requires_grad=True) for size in sizes_of]

        def step(qkv=qkv, mixings=mixings, scale=channels**-0.5) -> None:
            torch.autograd.grad(talking_heads.talking_heads(qkv, scale, *mixings).sum(), (qkv, *mixings))

        # Beyond the size of all maps nothing changes.
        whole = batch * heads * tokens**2 * qkv.element_size()
        useful = {min(mib, math.ceil(whole / 2**20)) for mib in sizes} | {default // 2**20}
        times = dict.fromkeys(sorted(useful), math.inf)
        for number in range(11 if setting.on_gpu else 2):  # in turns; the first round warms up
            for mib in times:
                setattr(talking_heads, constant, mib * 2**20)
                took = _seconds(setting, step, 5)
                times[mib] = min(times[mib], took) if number else math.inf
        setattr(talking_heads, constant, default)
        best = min(times, key=times.get)
        report.add(f"{shape}: default {default // 2**20} MiB", 1e3 * times[default // 2**20], "ms")
        report.add(
            f"{shape}: default / fastest, {best} MiB", times[default // 2**20] / times[best],
            at_most=1.03 if setting.on_gpu else None,
            change=f"oversmoothing/fused/talking_heads.py: {constant} = {best} * 2**20",
        )  # fmt: skip


def _seconds(setting: Setting, step: Callable[[], None], repeats: int) -> float:
    setting.wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    setting.wait()
    return (time.perf_counter() - start) / repeats


def training(setting: Setting, report: Report) -> None:
    """Float16 and bfloat16 beside float32: the same 300 steps, from the recipe's start of LayerScale."""
    steps, batch = (300, 128) if setting.on_gpu else (6, 8)
    size = dict(embed_dim=192, num_heads=4, depth=12) if setting.on_gpu else dict(embed_dim=24, num_heads=2, depth=2)
    kinds = ("attnscale_tiny_12", "attnscale_cait_XXS24_224") if setting.on_gpu else ("attnscale_cait_XXS24_224",)
    for name in kinds:
        losses = {}
        for precision in ("float32", "float16", "bfloat16"):
            dtype = getattr(torch, precision)
            torch.manual_seed(0)
            model = timm.create_model(name, img_size=32, patch_size=4, num_classes=8, **size).to(setting.device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            scaler = torch.amp.GradScaler(setting.device.type, enabled=dtype == torch.float16)
            patterns = torch.randn(8, 3, 32, 32, device=setting.device)
            total = torch.zeros(steps, device=setting.device)
            skipped, scale = 0, scaler.get_scale()
            for step in range(steps):
                targets = torch.randint(8, (batch,), device=setting.device)
                images = patterns[targets] + torch.randn(batch, 3, 32, 32, device=setting.device)
                with torch.autocast(setting.device.type, dtype, enabled=dtype != torch.float32):
                    loss = F.cross_entropy(model(images).float(), targets)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                total[step] = loss.detach()
                if scaler.is_enabled() and step % 10 == 9:
                    skipped, scale = skipped + (scaler.get_scale() < scale), scaler.get_scale()
            losses[precision] = float(total[-steps // 6 :].mean())
            report.add(f"{name}, {precision}: loss at the end", losses[precision])
            if dtype == torch.float16:
                report.add(f"{name}: loss scale at the end", scale)
                report.add(f"{name}: times the scale fell", float(skipped), at_most=5, change="--amp-dtype bfloat16")
        for precision in ("float16", "bfloat16"):
            report.add(
                f"{name}, {precision}: loss beside float32's", abs(losses[precision] - losses["float32"]),
                at_most=0.05 + 0.1 * losses["float32"] if setting.on_gpu else 0.5, correctness=True,
                change="--amp-dtype float32 for this model",
            )  # fmt: skip


def share(setting: Setting, report: Report) -> None:
    """The part of a step outside forward and backward, in the recipe's own loop.

    The total is measured without waits within a step: what the host does while the device works costs nothing. The
    parts are measured with a wait after each, so they are too large.
    """
    batches, steps = ((64, 256), 30) if setting.on_gpu else ((4,), 2)
    model = "attnscale_tiny_12" if setting.quick else "attnscale_small_12"
    for batch in batches:
        trainer, data = build_step(setting.world(), "--model", model, "--batch-size", str(batch))
        # What enters the model: images after normalisation and erasing, soft targets after mixup.
        images, targets = (tensor.to(setting.device) for tensor in data[0])
        images = trainer.prepare(images)
        images, targets = trainer.mixup(images, targets) if trainer.mixup is not None else (images, targets)

        def forward_backward(trainer=trainer, images=images, targets=targets) -> None:
            with torch.autocast(trainer.device.type, trainer.amp_dtype, enabled=trainer.amp_dtype != torch.float32):
                logits = trainer.model(images)
            trainer.scaler.scale(logits.float().mean()).backward()  # a sum would overflow
            trainer.bare_model.zero_grad(set_to_none=True)

        run_steps(trainer, data, steps)
        forward_backward()
        whole, inner = math.inf, math.inf
        for _ in range(3 if setting.on_gpu else 1):
            inner = min(inner, _seconds(setting, forward_backward, steps))
            whole = min(whole, run_steps(trainer, data, steps) / steps)
        report.add(
            f"batch {batch}: all but forward and backward", 1 - inner / whole, at_most=0.04 if setting.on_gpu else None,
            change="the largest of the parts below",
        )  # fmt: skip
        args = argparse.Namespace(device=str(setting.device), quick=True, batch_size=batch, steps=steps, model=model)
        for row in step_table(args)[:-1]:
            report.add(f"batch {batch}: {row['part']}, with waits", row["share"])


def data(setting: Setting, report: Report) -> None:
    """Images a second that one core loads, and how many cores this GPU needs with DeiT-S."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        number = 192 if setting.on_gpu else 8
        make_photographs(tree, number)
        files = fastload.build_dataset(recipe_of("FOLDER", tree))[0]
        rows = compare_loaders({"fast": files}, number, 1, 32 if setting.on_gpu else 4)
    rate = rows[0]["images_per_core_s"]
    report.add("images/s a core, the default loader", rate, "1/s")
    runner = Runner(setting.build(DEIT[1]), 256 if setting.on_gpu else 2, setting.device, "bfloat16")
    (step, _), *_ = setting.time([runner], "train", 5, 1)
    wanted = 1e3 * len(runner.images) / step
    report.add("images/s of this device at attnscale_small_12", wanted, "1/s")
    cores = utils.cores_of_process()
    report.add(
        f"share of that which {cores} cores feed", cores * rate / wanted, at_least=1.0 if setting.on_gpu else None,
        change=f"--num_workers {math.ceil(wanted / rate)}, which takes as many cores; or smaller files",
    )  # fmt: skip


def resume(setting: Setting, report: Report) -> None:
    """A run that is killed and started again ends where an uninterrupted one does."""
    if setting.quick:
        return report.add("tests/test_resume.py does this on a CPU", "left out")
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for split, number in (("train", 64), ("val", 8)):
            for label in range(4):
                place = Path(folder) / "data" / split / str(label)
                place.mkdir(parents=True)
                for i in range(number):
                    pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                    pixels[:, :, label % 3] //= 2 + label
                    Image.fromarray(pixels).save(place / f"{i}.jpg")
        words = [
            *(sys.executable, "main.py", "--model", "attnscale_small_12", "--input-size", "32", "--epochs", "3"),
            *("--model-kwargs", "embed_dim=96", "depth=3", "num_heads=3", "patch_size=4", "--data-set", "FOLDER"),
            *("--data-path", f"{folder}/data", "--batch-size", "16", "--num_workers", "2", "--auto_reload"),
            *("--device", str(setting.device), "--checkpoint-steps", "4", "--warmup-epochs", "0"),
        ]
        results, console = {}, Path(folder) / "console.txt"
        for name in ("whole", "killed"):
            output = Path(folder) / name
            run = [*words, "--output_dir", str(output)]
            with console.open("w") as file:
                if name == "killed" and not kill_when(output / "checkpoint.pth", run, file):
                    return report.failed("the run to be killed had ended by itself", console.read_text()[-4000:])
                code = subprocess.run(run, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
            printed = console.read_text()
            if code:
                return report.failed(f"the {name} run ended with {code}", printed[-4000:])
            if name == "killed" and "auto-reload: continuing" not in printed:
                return report.failed("the killed run did not go on but began again", printed[-4000:])
            results[name] = json.loads((output / "log.txt").read_text().splitlines()[-1])
        difference = abs(results["whole"]["test_loss"] - results["killed"]["test_loss"])
        report.add("test loss, killed and resumed against whole", difference, at_most=1e-2, correctness=True)


def kill_when(written: Path, words: list[str], output: IO[str], patience: float = 60) -> bool:
    """Starts a command and kills it as soon as it has written a file, or after ``patience`` seconds.

    Returns:
        Whether it was still running then.
    """
    process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + patience
        while process.poll() is None and not written.exists() and time.monotonic() < until:
            time.sleep(0.02)
        return process.poll() is None
    finally:
        process.kill()
        process.wait()


# Name -> what to run and its limit in seconds; the most valuable first, in case time runs out.
SECTIONS: dict[str, tuple[Callable[[Setting, Report], None], float]] = {
    "environment": (environment, 60),
    "parity": (parity, 90),
    "waits": (waits, 60),
    "speed": (speed, 300),
    "chunk": (chunk, 40),
    "training": (training, 100),
    "share": (share, 70),
    "kernels": (kernels, 40),
    "resume": (resume, 120),
    "data": (data, 50),
    "compiled": (compiled, 300),
}


# ----------------------------------------------------------------------------------------------------------------- main


class _OutOfTime(BaseException):
    """A section ran past its limit; no ``except Exception`` on its way, the compiler's for instance, may take it."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(*signal_arguments: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def out_of_time(report: Report, what: str, limit: float, details: str = "") -> None:
    """Notes that a section was ended: it has failed, unless its time was shorter than its own limit."""
    if limit < SECTIONS[report.section][1]:
        report.left_out(f"{what}: no time left")
    else:
        report.failed(what, details)


def run_section(name: str, setting: Setting, path: Path, limit: float) -> None:
    """Runs one section in this process; an error or a timeout becomes its last result."""
    report = Report(path, name)
    try:
        with _limit(limit):
            SECTIONS[name][0](setting, report)
    except _OutOfTime:
        out_of_time(report, f"stopped after {limit:.0f} s", limit, traceback.format_exc())
    except Exception as error:  # whatever it is, the other sections go on
        first_line = str(error).splitlines()[0] if str(error) else ""
        report.failed(f"{type(error).__name__}: {first_line}", traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_apart(name: str, args: argparse.Namespace, path: Path, limit: float) -> None:
    """Runs one section in its own process, so that a crashed driver or a hang ends with that process."""
    words = [sys.executable, str(Path(__file__)), "--section", name, "--lines", str(path), "--device", args.device]
    words += ["--seconds", str(limit)] + ["--quick"] * args.quick
    process = subprocess.Popen(words, start_new_session=True)
    try:
        code = process.wait(timeout=limit + GRACE)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return out_of_time(Report(path, name), f"hung; ended after {limit + GRACE:.0f} s", limit)
    if code:
        Report(path, name).failed(f"its process ended with {code}")


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu: the same code, small; its times mean nothing")
    parser.add_argument("--quick", action="store_true", help="small models, few steps: whether everything runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=500, help="for all [500]; what is left out then is said")
    parser.add_argument("--results-file", type=Path, default=Path("check_gpu.json"), metavar="JSON")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser


def main(words: list[str] | None = None) -> int:
    """Runs the sections, prints what was missed, writes the JSON file."""
    args = get_parser().parse_args(words)
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("error: --device cuda: torch sees no GPU here (nvidia-smi shows the driver's view); --device cpu "
                  "--quick runs the same code small", file=sys.stderr)  # fmt: skip
            return 2
        device = torch.device("cuda", device.index or 0)
    setting = Setting(device=device, quick=args.quick or device.type == "cpu")
    if args.section:
        run_section(args.section, setting, args.lines, args.seconds)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its section ends with it
    began = time.monotonic()
    path = args.results_file.with_suffix(".jsonl")
    path.write_text("")
    for name in args.only or SECTIONS:
        left = args.seconds - GRACE * setting.on_gpu - (time.monotonic() - began)
        limit = left if args.only == [name] else min(SECTIONS[name][1], left)
        if left < min(SECTIONS[name][1], WORTHWHILE):
            Report(path, name).left_out("not run: no time left")
        elif setting.on_gpu:
            run_apart(name, args, path, limit)
        else:
            run_section(name, setting, path, limit)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    took = time.monotonic() - began
    counts = {verdict: sum(line["verdict"] == verdict for line in lines) for verdict in ("held", "missed", "measured")}
    failed = [line for line in lines if line["verdict"] == "failed"]
    missed = [line for line in lines if line["verdict"] == "missed"]
    left_out = [line for line in lines if line["verdict"] == "left out"]
    print(f"\n{took:.0f} s: " + ", ".join(f"{number} {verdict}" for verdict, number in counts.items()), end="")
    print(f", {len(failed)} section(s) failed, {len(left_out)} without the time to end")
    for line in (*missed, *failed, *left_out):
        print(format_line(line))
    results = dict(command=["python", *sys.argv], seconds=took, quick=setting.quick, results=lines)
    args.results_file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return int(bool(failed) or any(line["correctness"] for line in missed))


if __name__ == "__main__":
    sys.exit(main())
