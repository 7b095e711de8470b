"""What the remedies cost, as ratios to the plain model; where a step's time goes; the data path; any one model's speed.

    python scripts/benchmark.py                      # the tables of docs/performance.md
    python scripts/benchmark.py --quick              # the same with small batches and few rounds: under two minutes
    python scripts/benchmark.py --only step,data     # scripts/benchmark_step.py and benchmark_data.py have more flags
    python scripts/benchmark.py --compare deit_small_patch16_224 attnscale_small_12 --model-kwargs depth=48
    python scripts/benchmark.py --model attnscale_small_12 --device cuda

Models compared take turns in one process, step by step, so that other load on the machine affects all of them; ratios
are medians of the ratios within a round. Remedies have lambda != 0. Bytes are those kept for backward, parameters
excluded: they do not depend on the machine. --results-file stores everything as JSON. On CUDA the defaults give the GPU
work at all times: batches of 256 under bfloat16 autocast, more steps and warm-up (scripts/workload.py).
"""

import argparse
import gc
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # without pyplot: no display and no global state
from torch import Tensor, nn

import models  # noqa: F401  (registers the zoo with timm)
import oversmoothing
from options import KeyValues, spell
from oversmoothing.analysis.cost import count_macs
from oversmoothing.analysis.figures import COLOURS
from oversmoothing.attention import attention_layers
from oversmoothing.weights import check_model_name, create_model
from scripts import markdown
from scripts.benchmark_data import data_table
from scripts.benchmark_host import host_table
from scripts.benchmark_step import scaling_table, step_table
from scripts.workload import precision, workload
from utils import SetupError, resolve_device

MIB = 2**20


class Comparison(NamedTuple):
    """A plain model and what is compared with it, all built with the same arguments."""

    plain: str
    variants: tuple[str, ...]
    img_size: int
    plain_kwargs: dict[str, Any]  # gives the plain model the depth in the variants' names


def _small(depth: int) -> Comparison:
    names = tuple(f"{family}_small_{depth}" for family in ("deit", "attnscale", "featscale", "attnfeatscale"))
    return Comparison("deit_small_patch16_224", names, 224, dict(depth=depth))


def _cait(size: str, img_size: int) -> Comparison:
    name = f"cait_{size}_224" if img_size == 224 else f"cait_{size}"
    variants = tuple(f"{family}_{name}" for family in ("attnscale", "featscale", "attnfeatscale"))
    return Comparison(f"cait_{size.lower()}_{img_size}", variants, img_size, {})


COMPARISONS = (_small(12), _small(24), _cait("XXS24", 224), _cait("S24", 224), _cait("XXS24", 384), _cait("S24", 384))
QUICK_COMPARISONS = (_small(12), _cait("XXS24", 224))


def get_parser() -> argparse.ArgumentParser:
    """The flags; those for one model are named as in timm's benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ",".join(TABLES)
    parser.add_argument("--only", default=tables, metavar="A,B", help=f"tables to make, of {tables}")
    parser.add_argument("--quick", action="store_true", help="two comparisons, batch 2, 3 rounds")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="NAME",
        help="only the models table: a plain model, then what to compare with it; NAME+REMEDY adds a remedy",
    )
    parser.add_argument("--model", metavar="NAME", help="no table: the speed, memory and MACs of this model")
    parser.add_argument("--bench", choices=("both", "infer", "train"), default="both", help="what of it")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE")
    parser.add_argument(
        "-b",
        "--batch-size",
        type=int,
        help="default: 8 for models (--quick: 2), 64 with --model; on CUDA 256 (--quick: 64), 64 above 224 px",
    )
    parser.add_argument("--img-size", type=int, help="default: that of the model")
    parser.add_argument(
        "--rounds",
        type=int,
        help="measured rounds of a table; default 7, 5, 9 by table, 30 for models on CUDA (--quick: fewer)",
    )
    parser.add_argument("--num-warm-iter", type=int, help="with --model: steps before measuring; default 3, on CUDA 10")
    parser.add_argument("--num-bench-iter", type=int, help="with --model: steps measured; default 10, on CUDA 50")
    parser.add_argument("--no-retry", action="store_true", help="with --model: fail instead of halving the batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--amp-dtype",
        choices=("bfloat16", "float16", "none"),
        help="run under autocast; default: none (float32), on CUDA bfloat16",
    )
    parser.add_argument("--torchcompile", nargs="?", const="default", metavar="MODE", help="a mode of torch.compile")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="CPU threads; one table for each number")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of this process, for one thread on a machine that others use too",
    )
    parser.add_argument("--results-file", type=entry.user_path, metavar="JSON")
    parser.add_argument("--plot", type=entry.user_path, metavar="PNG", help="draw the models table")
    parser.add_argument(
        "--read", type=entry.user_path, nargs="+", metavar="JSON", help="measure nothing: show these --compare runs"
    )
    return parser


# ------------------------------------------------------------------------------------------------------ building blocks


def build(name: str, img_size: int | None, device: torch.device, **kwargs: Any) -> nn.Module:
    """A model with random parameters of its remedy: at zero, some of the remedy's work could be skipped.

    ``deit_small_patch16_224+gfsa`` is that model with a remedy added.
    """
    name, *remedies = name.split("+")
    remedies = {remedy: {} for remedy in remedies}
    model = create_model(name, input_size=img_size, model_kwargs=kwargs, remedies=remedies).to(device)
    if not hasattr(model, "patch_embed"):
        raise ValueError(f"{name} is no vision transformer: give a model with patches")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if oversmoothing.is_remedy_parameter(parameter_name):
                parameter.normal_(std=0.3)
    return model


class Runner:
    """One model's training step and its evaluation, on random images."""

    def __init__(
        self, model: nn.Module, batch_size: int, device: torch.device, amp_dtype: str | None, mode: str | None = None
    ) -> None:
        _, channels, height, width = (1, 3, *model.patch_embed.img_size)
        self.model, self.device = model, device
        if min(height, width) < min(model.patch_embed.patch_size):
            raise ValueError(f"--img-size {height}: smaller than a patch of the model; give a larger one")
        self.images = torch.randn(batch_size, channels, height, width, device=device)
        self.targets = torch.randint(model.num_classes, (batch_size,), device=device)
        self.call = torch.compile(model, mode=mode) if mode else model
        self.autocast: Callable[[], Any] = nullcontext
        self.scale = 1.0
        if amp_dtype is not None:
            self.autocast = lambda: torch.autocast(device.type, getattr(torch, amp_dtype))
            self.scale = 1024.0 if amp_dtype == "float16" else 1.0

    def loss(self) -> Tensor:
        """The forward half of a training step."""
        with self.autocast():
            logits = self.call(self.images)
        return F.cross_entropy(logits.float(), self.targets)

    def train(self) -> None:
        """Forward and backward; the optimizer's part depends on the parameters only."""
        self.model.train()
        (self.loss() * self.scale).backward()
        self.model.zero_grad(set_to_none=True)

    def infer(self) -> None:
        """Forward in evaluation mode."""
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            self.call(self.images)


def seconds(step: Callable[[], None], device: torch.device, clock: str = "wall") -> float:
    """Time of one call, work on the device included."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


def bytes_saved(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that ``loss()`` keeps for its backward pass: each storage counts once, parameters do not count."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        # Not the tensor: a node that saves its own output, and gets it back from here, would never be freed.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
        loss()
    return sum(storage.nbytes() for storage in storages.values())


# --------------------------------------------------------------------------------------------------------------- tables


def models_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of every comparison at every number of threads; see :func:`compare`."""
    if args.compare:
        comparisons = [Comparison(args.compare[0], tuple(args.compare[1:]), args.img_size or 224, {})]
    else:
        comparisons = QUICK_COMPARISONS if args.quick else COMPARISONS
    rows = []
    for comparison in comparisons:
        for threads in args.threads or [torch.get_num_threads()]:
            torch.set_num_threads(threads)
            rows += compare(comparison, args)
            print(format_rows(rows[-1 - len(comparison.variants) :]), flush=True)
            gc.collect()
    return rows


def compare(comparison: Comparison, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures a plain model and its variants in turns.

    Returns:
        One row a model, the plain one first: times of a step in milliseconds (medians), memory kept for backward, and
        all three relative to the plain model.
    """
    device = torch.device(args.device)
    img_size = args.img_size or comparison.img_size
    work = workload("models", device, quick=args.quick, img_size=img_size)
    batch_size, amp_dtype = args.batch_size or work.batch_size, precision(args.amp_dtype, work.amp_dtype)
    names = (comparison.plain, *comparison.variants)
    runners = []
    for name in names:
        kwargs = {**(comparison.plain_kwargs if name == comparison.plain else {}), **args.model_kwargs}
        model = build(name, img_size, device, **kwargs)
        runners.append(Runner(model, batch_size, device, amp_dtype, args.torchcompile))
    num_rounds = args.rounds or work.steps
    times = {
        # Evaluation first, as in a process that only evaluates: training changes how the C library gives memory back.
        phase: take_turns([getattr(runner, phase) for runner in runners], num_rounds, device, args.clock, work.warmup)
        for phase in ("infer", "train")
    }
    saved = [bytes_saved(runner.model, runner.loss) for runner in runners]
    rows = []
    for i, name in enumerate(names):
        row = dict(
            model=name,
            plain=comparison.plain,
            img_size=img_size,
            batch_size=batch_size,
            amp_dtype=amp_dtype or "float32",
            depth=len(attention_layers(runners[i].model)),
            threads=torch.get_num_threads(),
            saved_mib=saved[i] / MIB,
            saved_ratio=saved[i] / saved[0],
        )
        for phase, rounds in times.items():
            row[f"{phase}_ms"] = 1e3 * statistics.median(turn[i] for turn in rounds)
            row[f"{phase}_ratio"] = statistics.median(turn[i] / turn[0] for turn in rounds)
            row[f"{phase}_rounds_s"] = [turn[i] for turn in rounds]
        rows.append(row)
    return rows


def take_turns(
    steps: list[Callable[[], None]], num_rounds: int, device: torch.device, clock: str, warmup: int = 1
) -> list[list[float]]:
    """Seconds of every step in every round, after ``warmup`` rounds; each round starts with the next step."""
    for step in warmup * steps:
        step()
    rounds = []
    for number in range(num_rounds):
        turn = [0.0] * len(steps)
        for i in range(len(steps)):
            i = (i + number) % len(steps)
            turn[i] = seconds(steps[i], device, clock)
        rounds.append(turn)
    return rounds


def format_rows(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    first = rows[0]
    header = ("model", "train step", "eval", "bytes saved", "train ms", "eval ms", "saved MiB")
    ratios, amounts = ("train_ratio", "infer_ratio", "saved_ratio"), ("train_ms", "infer_ms", "saved_mib")
    cells = [
        [f"{row['model']} ({row['depth']})", *(f"{row[k]:.2f}" for k in ratios), *(f"{row[k]:.0f}" for k in amounts)]
        for row in rows
    ]
    setting = f"\n{first['img_size']} px, batch {first['batch_size']}, {first['threads']} thread(s)\n"
    return f"{setting}\n{markdown.table(header, cells)}"


def plot_models(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws what every variant costs relative to its plain model: training step, evaluation, memory for backward."""
    rows = [row for row in rows if row["model"] != row["plain"]]
    figure = Figure(figsize=(10, 1.2 + 0.28 * len(rows)), layout="constrained")
    panels = {"train_ratio": "training step", "infer_ratio": "evaluation", "saved_ratio": "bytes kept for backward"}
    for axes, (key, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        ratios = [row[key] for row in rows]
        axes.barh(range(len(rows)), ratios, color=[COLOURS[ratio > 1] for ratio in ratios])
        for i, ratio in enumerate(ratios):
            axes.text(ratio - 0.02, i, f"{ratio:.2f}", va="center", ha="right", color="white", fontsize=8)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(title=title, xlabel="relative to the plain model", xlim=(0, max(1.25, *ratios) + 0.05))
    labels = [f"{row['model']}, {row['depth']} blocks, {row['img_size']} px, batch {row['batch_size']}" for row in rows]
    figure.axes[0].set_yticks(range(len(rows)), labels, fontsize=8)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


# A table is a function from the arguments to rows; `--only` takes these names.
# Data come last: that table sets torch to one thread and leaves it so.
TABLES: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "models": models_table,
    "host": host_table,
    "step": step_table,
    "scaling": scaling_table,
    "data": data_table,
}


# ------------------------------------------------------------------------------------------------------------ one model


def benchmark_model(args: argparse.Namespace) -> dict[str, Any]:
    """The speed of ``args.model``, with the keys that timm's benchmark writes.

    A batch that does not fit into memory is halved until it does.

    Raises:
        RuntimeError: If not even one image fits, or with ``--no-retry`` the batch does not.
    """
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads[0])
    batch_size = args.batch_size or workload("model", device, img_size=args.img_size or 224).batch_size
    while True:
        try:
            return _benchmark_model(args, device, batch_size)
        except RuntimeError as error:
            if not _is_out_of_memory(error) or args.no_retry or batch_size == 1:
                raise
        batch_size //= 2
        print(f"out of memory: trying --batch-size {batch_size}", file=sys.stderr)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)  # the latter: torch on CPU


def _benchmark_model(args: argparse.Namespace, device: torch.device, batch_size: int) -> dict[str, Any]:
    model = build(args.model, args.img_size, device, **args.model_kwargs)
    work = workload("model", device)
    amp_dtype = precision(args.amp_dtype, work.amp_dtype)
    runner = Runner(model, batch_size, device, amp_dtype, args.torchcompile)
    result: dict[str, Any] = dict(
        model=args.model,
        batch_size=batch_size,
        img_size=runner.images.shape[-1],
        amp_dtype=amp_dtype or "float32",
        param_count=round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2),
        gmacs=round(count_macs(runner.model, runner.images[:1]) / 1e9, 3),
        saved_mib_per_image=round(bytes_saved(model, runner.loss) / batch_size / MIB, 2),
    )
    for phase in ("infer", "train") if args.bench == "both" else (args.bench,):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = getattr(runner, phase)
        for _ in range(work.warmup if args.num_warm_iter is None else args.num_warm_iter):
            step()
        times = [seconds(step, device, args.clock) for _ in range(args.num_bench_iter or work.steps)]
        step_time = statistics.median(times)
        result[f"{phase}_samples_per_sec"] = round(batch_size / step_time, 2)
        result[f"{phase}_step_time"] = round(1e3 * step_time, 3)  # milliseconds
        if device.type == "cuda":
            result[f"{phase}_peak_mib"] = round(torch.cuda.max_memory_allocated(device) / MIB, 1)
    return result


# ----------------------------------------------------------------------------------------------------------------- main


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that the numbers hold for."""
    machine: dict[str, Any] = dict(
        processor=platform.processor() or platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
    )
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        machine |= dict(processor=names[0] if names else machine["processor"], cores=len(names))
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def check_args(args: argparse.Namespace) -> None:
    """Gathers everything wrong with the flags and raises once, before anything is measured.

    Raises:
        ValueError: One line a problem.
        ModelError: If a model does not exist.
        SetupError: If a device does not exist.
    """
    resolve_device(args.device)
    for name in args.compare or ():
        check_model_name(name.split("+")[0], "--compare")
    if args.model:
        check_model_name(args.model.split("+")[0])
    problems = []
    if unknown := set(args.only.split(",")) - set(TABLES):
        problems.append(f"--only {args.only}: no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    for flag in ("batch_size", "img_size", "rounds", "num_bench_iter", "threads"):
        value = getattr(args, flag)
        values = value if isinstance(value, list) else [value]
        if not all(number is None or 1 <= number <= 10**6 for number in values):
            problems.append(f"{spell(args, flag)}: give a whole number, 1 or more")
    if args.num_warm_iter is not None and not 0 <= args.num_warm_iter <= 10**6:
        problems.append(f"--num-warm-iter {args.num_warm_iter}: give a whole number, 0 or more")
    if args.clock == "cpu" and not args.device.startswith("cpu"):
        problems.append(f"--clock cpu --device {args.device}: processor time says nothing about another device")
    for flag in ("results_file", "plot"):
        path = getattr(args, flag)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            problems.append(f"{spell(args, flag)}: give a file in a folder that is there")
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        problems.append(f"--plot {args.plot}: give a file that ends in .png")
    if problems:
        raise ValueError("\n".join(problems))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The models table of a ``--results-file``.

    Raises:
        ValueError: If it has none.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["models"]
        format_rows(rows)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"--read {path}: holds no models table: give what --compare --results-file wrote") from error
    return rows


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints and returns what ``--results-file`` gets.

    Raises:
        ValueError: If a flag is wrong; further errors as :func:`check_args`.
    """
    check_args(args)
    wanted = ["models"] if args.compare else args.only.split(",")
    results: dict[str, Any] = dict(
        command=shlex.join(["python", *sys.argv]), machine=describe_machine(torch.device(args.device))
    )
    print(json.dumps(results["machine"]))
    if args.read:
        tables = [read_results(file) for file in args.read]
        print(*map(format_rows, tables), sep="\n")
        results["models"] = [row for rows in tables for row in rows]
    elif args.model:
        results["model"] = benchmark_model(args)
        print(f"--result\n{json.dumps(results['model'], indent=4)}")
    else:
        results |= {name: TABLES[name](args) for name in wanted}
    if args.plot and "models" in results:
        plot_models(results["models"], args.plot)
    if args.results_file:
        args.results_file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def cli() -> int:
    """Command line; see the head of this file. Returns the exit code."""
    args = get_parser().parse_args()
    return entry.explained(lambda: main(args) and 0, ValueError, OSError, SetupError, torch.OutOfMemoryError)


if __name__ == "__main__":
    entry.run(cli)
