"""How well a run uses its machine: waiting for images, model FLOPs utilisation (MFU), memory. For rank 0 to write."""

import re
import resource
import sys

import torch
from torch import nn

from oversmoothing.analysis.cost import count_macs

# Device name from torch.cuda.get_device_name() -> dense peak in TFLOP/s: tensor cores without sparsity and with float32
# accumulation, as torch uses them; float32 without tensor cores. MIG slices, laptop chips and cut-down chips have other
# peaks and match no row. Source: NVIDIA's data sheets (A100, H100, H200, HGX B200, L4, L40S, V100, T4) and the white
# papers on GA102 (3090) and Ada (4090); where they give the number with sparsity, half of it. Quoted from memory.
PEAKS: dict[str, dict[str, float]] = {
    r"NVIDIA A100.(SXM4|PCIE|PG509).\d+GB|NVIDIA A100 80GB PCIe": dict(half=312, tf32=156, float32=19.5),
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": dict(half=989.4, tf32=494.7, float32=67),
    r"NVIDIA H100 PCIe": dict(half=756, tf32=378, float32=51),
    r"NVIDIA B200": dict(half=2250, tf32=1125, float32=75),
    r"NVIDIA L4": dict(half=121, tf32=60, float32=30.3),
    r"NVIDIA L40S": dict(half=362, tf32=183, float32=91.6),
    r"NVIDIA GeForce RTX 4090": dict(half=165.2, tf32=82.6, float32=82.6),
    r"NVIDIA GeForce RTX 3090": dict(half=71, tf32=35.6, float32=35.6),
    r"Tesla V100-SXM2-\d+GB": dict(float16=125, float32=15.7),
    r"Tesla T4": dict(float16=65, float32=8.1),
}


def peak_flops(device_name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Peak of a device in floating-point operations a second, dense.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it.
        dtype: Type of the matrix multiplications.
        tf32: Whether float32 matrices may be multiplied in TF32.

    Returns:
        FLOP/s; None if the table lacks the device, or the type for this device.
    """
    row = next((row for pattern, row in PEAKS.items() if re.fullmatch(pattern, device_name)), {})
    name = str(dtype).removeprefix("torch.")
    if name == "float32" and tf32:
        name = "tf32" if "tf32" in row else "float32"
    if name in ("float16", "bfloat16") and "half" in row:
        name = "half"
    return row[name] * 1e12 if name in row else None


def training_flops(model: nn.Module, input_size: int, device: torch.device) -> float:
    """Model FLOPs to train on one image: three forward passes (the backward pass counts two), 2 FLOPs a multiply-add.

    By the definition of MFU (PaLM, arXiv 2204.02311, appendix B), recomputation (``--grad-checkpointing``), the
    optimizer, the EMA and a teacher do not count.
    """
    with torch.compiler.set_stance("force_eager"):  # the counter sees operators, not compiled code
        return 6.0 * count_macs(model, torch.zeros(1, 3, input_size, input_size, device=device))


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: tensors on the device for CUDA, else resident memory of this process.

    That is without its workers, but with the batches that it got from them.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Efficiency:
    """The efficiency of each epoch.

    Args:
        model: Without wrappers; if the device's peak is known, one forward pass counts the model's cost.
        input_size: Side of its images in pixels.
        device: Where it trains.
        amp_dtype: Precision of the forward pass.
    """

    def __init__(self, model: nn.Module, input_size: int, device: torch.device, amp_dtype: torch.dtype) -> None:
        self.device = device
        self.peak = None
        if device.type == "cuda":
            tf32 = torch.get_float32_matmul_precision() != "highest"
            self.peak = peak_flops(torch.cuda.get_device_name(device), amp_dtype, tf32=tf32)
        self.flops = training_flops(model, input_size, device) if self.peak else None

    def epoch(self, images: int, seconds: float, waited: float) -> dict[str, float]:
        """Numbers of an epoch of ``images`` images on this process: fractions of 1, and GB (1e9 bytes)."""
        numbers = {"efficiency/waiting_for_data": waited / seconds, "efficiency/peak_memory_gb": self.memory()}
        if self.peak:
            numbers["efficiency/mfu"] = images * self.flops / seconds / self.peak
        return numbers

    def memory(self) -> float:
        return peak_memory(self.device) / 1e9


def describe(numbers: dict[str, float]) -> str:
    """One console line."""
    mfu = f"MFU {numbers['efficiency/mfu']:.1%}, " if "efficiency/mfu" in numbers else ""
    return (
        f"efficiency: {mfu}{numbers['efficiency/waiting_for_data']:.1%} of the time waiting for data, "
        f"peak memory {numbers['efficiency/peak_memory_gb']:.2f} GB"
    )
