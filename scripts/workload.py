"""How much work the benchmarks give a device where no flag says so.

A GPU must have work at all times: with the small batches that suit a CPU it waits for the host, and the benchmark
measures kernel launches. So on CUDA batches are large, under bfloat16 autocast, with more steps and warm-up.
"""

from typing import NamedTuple

import torch


class Workload(NamedTuple):
    """Defaults of one benchmark on one kind of device."""

    batch_size: int
    steps: int  # or rounds, of a table that compares
    warmup: int = 1  # steps before the clock starts
    amp_dtype: str | None = None  # None: float32


# Of each benchmark: on a CPU, on a CPU with --quick, on CUDA, on CUDA with --quick.
WORKLOADS = {
    "models": (Workload(8, 7), Workload(2, 3), Workload(256, 30, 5, "bfloat16"), Workload(64, 10, 3, "bfloat16")),
    "model": (Workload(64, 10, 3),) * 2 + (Workload(256, 50, 10, "bfloat16"),) * 2,
    # The recipe's own precision, which main.py chooses: float16 on CUDA.
    "step": (Workload(64, 4), Workload(8, 2), Workload(256, 50, 5), Workload(64, 10, 3)),
    "scaling": (Workload(16, 3), Workload(4, 3), Workload(256, 50, 5), Workload(64, 10, 3)),
}


def workload(benchmark: str, device: str | torch.device, *, quick: bool = False, img_size: int = 224) -> Workload:
    """What ``benchmark``, one of ``WORKLOADS``, does by default.

    Args:
        benchmark: Its name.
        device: Where it runs.
        quick: Whether a small workload is enough.
        img_size: In pixels; above 224, a CUDA batch is a quarter, so that timm's CaiT fits into memory.
    """
    cuda = torch.device(device).type == "cuda"
    chosen = WORKLOADS[benchmark][2 * cuda + quick]
    return chosen._replace(batch_size=chosen.batch_size // 4) if cuda and img_size > 224 else chosen


def precision(amp_dtype: str | None, default: str | None) -> str | None:
    """``--amp-dtype`` ("none" is float32), or else the workload's; returns None for float32."""
    return None if amp_dtype == "none" else amp_dtype or default
