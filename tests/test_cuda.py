"""Behaviour that only a GPU can show; skipped without one. Times are measured by ``scripts/check_gpu.py``."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_slots
import timm
import torch
import torch.nn.functional as F
from conftest import TINY
from runs import ROOT, tiny_tree
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

import oversmoothing
from oversmoothing.fused import talking_heads
from readers.loader import build_loader
from scripts import check_gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

NAMES = ["attnfeatscale_tiny_12", "attnfeatscale_cait_XXS24", "attnfeatscale_swin_tiny_patch4_window7_224"]
LIMITS = {None: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
RUN = (
    *(sys.executable, "main.py", "--model", "attnscale_small_12", "--input-size", "32", "--data-set", "FOLDER"),
    *("--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8", "--batch-size", "4"),
    *("--num_workers", "0", "--device", "cuda", "--warmup-epochs", "0"),
)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.0, **({} if "swin" in name else TINY))  # no draws: devices differ
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if oversmoothing.is_remedy_parameter(key) or "gamma" in key:
                parameter.normal_(std=0.3)
    return model.train()


def gradient(model: nn.Module, images: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.autocast(images.device.type, dtype or torch.float32, enabled=dtype is not None):
        logits = model(images)
    targets = torch.arange(len(images), device=images.device)
    (1024 * F.cross_entropy(logits.double(), targets)).backward()
    return torch.cat([parameter.grad.double().flatten().cpu() / 1024 for parameter in model.parameters()])


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Without TF32 in the patch embedding's convolution; matrix products do not use it unless they are told to."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fast_forms_equal_the_definition_in_float64(name: str, dtype: torch.dtype | None, no_tf32: None) -> None:
    model = build(name)
    images = torch.randn(4, 3, *(2 * [model.patch_embed.img_size[0]]))
    exact = gradient(oversmoothing.set_fused(copy.deepcopy(model), False).double(), images.double(), None)
    found = gradient(model.cuda(), images.cuda(), dtype)
    assert (found - exact).norm() < LIMITS[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chunks_of_talking_heads_do_not_change_the_result(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 5, 4, 49, 16, device="cuda", dtype=dtype)
    mixings = [torch.randn(*size, device="cuda") for size in ((4, 4), (4,), (4, 4), (4,))]
    results = []
    for limit in (2**30, 2 * 4 * 49 * 49 * dtype.itemsize, 4 * 20 * 49 * dtype.itemsize):  # all, two images, some rows
        monkeypatch.setattr(talking_heads, "CHUNK_BYTES", limit)
        tensors = [tensor.clone().requires_grad_() for tensor in (qkv, *mixings)]
        y = talking_heads.talking_heads(tensors[0], 0.25, *tensors[1:])
        results.append([y, *torch.autograd.grad(y.float().sum(), tensors, materialize_grads=True)])
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert (a - b).norm() <= tolerance * b.norm().clamp(min=1e-6)


@pytest.mark.parametrize("section", [check_gpu.environment, check_gpu.waits])
def test_nccl_works_and_no_step_waits_for_the_device(section: Callable, tmp_path: Path) -> None:
    report = check_gpu.Report(tmp_path / "lines", "test")
    section(check_gpu.Setting(device=torch.device("cuda", 0), quick=True), report)
    assert '"verdict": "missed"' not in report.path.read_text() and '"failed"' not in report.path.read_text()


def run(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_an_ema_in_host_memory_is_evaluated(tmp_path: Path) -> None:
    tiny_tree(tmp_path / "data")
    flags = ("--data-path", tmp_path / "data", "--output_dir", tmp_path / "run", "--auto_reload")
    ema = ("--model-ema-force-cpu", "--eval-ema", "--checkpoint-steps", "1")
    words = [*map(str, (*RUN, *flags, *ema, "--epochs", 3))]
    with (tmp_path / "console.txt").open("w") as console:
        running = check_gpu.kill_when(tmp_path / "run" / "checkpoint.pth", words, console, patience=120)
    assert running, f"it ended before it was killed:\n{(tmp_path / 'console.txt').read_text()}"
    done = run(*words)
    assert done.returncode == 0 and "auto-reload: continuing" in done.stdout, (
        (tmp_path / "console.txt").read_text() + done.stdout + done.stderr
    )
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 3


@pytest.mark.slow
def test_memory_that_does_not_suffice_is_a_sentence(tmp_path: Path) -> None:
    program = "import sys, torch; torch.cuda.set_per_process_memory_fraction(1e-4); import main; sys.exit(main.cli())"
    tiny_tree(tmp_path / "data")
    done = run(sys.executable, "-c", program, *RUN[2:], "--data-path", tmp_path / "data")
    assert done.returncode == 2 and "memory does not hold a step" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_more_processes_than_gpus_are_refused_by_name(tmp_path: Path) -> None:
    tiny_tree(tmp_path / "data")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    number = torch.cuda.device_count() + 1
    done = run(*launcher, f"--nproc_per_node={number}", *RUN[1:], "--data-path", tmp_path / "data")
    assert done.returncode != 0 and f"{number} processes on this node" in done.stdout + done.stderr


def test_pinned_batches_let_go_of_the_workers_memory() -> None:
    """The thread that copies batches to pinned memory receives them; nothing else holds the slots."""
    dataset = test_slots.Numbered(images=100)
    loading = dict(batch_size=test_slots.BATCH, num_workers=2, pin_memory=True, drop_last=False)
    loader = build_loader(dataset, SequentialSampler(dataset), **loading, image_bytes=3 * test_slots.SIZE**2)
    for _ in range(2):
        batches = list(loader)
        assert all(images.is_pinned() for images, _ in batches)
        test_slots.assert_expected(batches, dataset)
        assert not test_slots.memory_of(loader).taken.any()
