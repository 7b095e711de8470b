"""Operators that a training step calls, and the host's time to call them: with small batches a GPU waits for the host.

    python scripts/benchmark_host.py                  # DeiT-S and CaiT-S24 with the remedies against timm's
    python scripts/benchmark_host.py --amp-dtype none

Both depend on the number of layers, not on their width: the models are thin and their images small, so that on a CPU
nearly all the time is spent on calls. Forward and backward under autocast; views are not counted, they launch nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models  # noqa: F401  (registers the zoo with timm)
from oversmoothing import add_remedy
from scripts import markdown

VIEWS = {"aten::_unsafe_view", "aten::detach"}  # besides what torch marks as one
COMPARISONS = {
    "deit_small_patch16_224": ("attnscale_small_12", "featscale_small_12", "attnfeatscale_small_12"),
    "cait_s24_224": ("attnscale_cait_S24_224", "featscale_cait_S24_224", "attnfeatscale_cait_S24_224"),
}
THIN = dict(img_size=32, patch_size=16, embed_dim=24, num_heads=4, num_classes=10)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name not in VIEWS:
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Step:
    """Forward and backward of a thin model with as many layers as ``name``; ``name+remedy`` adds a remedy."""

    def __init__(self, name: str, amp_dtype: torch.dtype | None = torch.bfloat16) -> None:
        torch.manual_seed(0)
        name, *remedies = name.split("+")
        self.model, self.amp_dtype = timm.create_model(name, **THIN).train(), amp_dtype
        if remedies:
            add_remedy(self.model, remedies)
        self.images = torch.randn(2, 3, THIN["img_size"], THIN["img_size"])

    def __call__(self) -> None:
        autocast = torch.autocast("cpu", self.amp_dtype) if self.amp_dtype else nullcontext()
        with autocast:
            loss = self.model(self.images).float().sum()
        loss.backward()
        self.model.zero_grad(set_to_none=True)


def count_operators(step: Callable[[], None]) -> Counter[str]:
    """Calls of each operator in ``step``, views left out."""
    with _Counting() as counting:
        step()
    return counting.calls


def host_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a model: operators and host time of a step, and both relative to timm's plain model.

    Args:
        args: Reads ``amp_dtype`` ("none": float32), ``rounds`` and ``quick``.
    """
    torch.set_num_threads(1)
    amp_dtype = None if args.amp_dtype == "none" else getattr(torch, args.amp_dtype or "bfloat16")
    rounds = args.rounds or (10 if args.quick else 100)
    rows = []
    for plain, variants in COMPARISONS.items():
        names = (plain, *variants)
        steps = [Step(name, amp_dtype) for name in names]
        calls = [count_operators(step).total() for step in steps]
        times = [[] for _ in steps]
        for _ in range(rounds):
            for step, measured in zip(steps, times, strict=True):
                start = time.process_time()
                step()
                measured.append(time.process_time() - start)
        # The fastest tenth: other programs on the machine can only add time.
        host = [statistics.quantiles(measured, n=10, method="inclusive")[0] for measured in times]
        for name, number, seconds in zip(names, calls, host, strict=True):
            ratios = dict(operator_ratio=number / calls[0], host_ratio=seconds / host[0])
            rows.append(dict(model=name, amp_dtype=str(amp_dtype), operators=number, host_ms=1e3 * seconds) | ratios)
    print(format_host(rows), flush=True)
    return rows


def format_host(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    cells = [
        [
            *(row["model"], str(row["operators"]), f"{row['operator_ratio']:.2f}"),
            *(f"{row['host_ms']:.1f}", f"{row['host_ratio']:.2f}"),
        ]
        for row in rows
    ]
    table = markdown.table(("model", "operators", "ratio", "host ms", "ratio"), cells)
    return f"\nEager, {rows[0]['amp_dtype'].removeprefix('torch.')}\n\n{table}"


def main() -> None:
    """Measures alone, without the other tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amp-dtype", choices=("bfloat16", "float16", "none"), default="bfloat16")
    parser.add_argument("--rounds", type=int, help="of all models in turns; default 100")
    parser.add_argument("--quick", action="store_true", help="ten rounds")
    parser.add_argument("--results-file", type=Path, metavar="JSON")
    args = parser.parse_args()
    rows = host_table(args)
    if args.results_file:
        args.results_file.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
