"""The benchmark runs, and the memory kept for backward is what docs/performance.md promises. No test holds a time."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from oversmoothing.analysis.cost import count_macs
from scripts import benchmark, benchmark_host, benchmark_step
from scripts.workload import WORKLOADS, workload

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL_RUN = [
    "--compare",
    "vit_tiny_patch16_224",
    "attnscale_tiny_12",
    "featscale_tiny_12",
    "--img-size",
    "32",
    "--batch-size",
    "2",
    "--rounds",
    "2",
    "--model-kwargs",
    "depth=2",
    "patch_size=8",
]


def saved(name: str, batch_size: int, img_size: int, **kwargs: object) -> int:
    runner = benchmark.Runner(benchmark.build(name, img_size, CPU, **kwargs), batch_size, CPU, None)
    return benchmark.bytes_saved(runner.model.train(), runner.loss)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["attnscale", "featscale"])
@pytest.mark.parametrize("depth, limit", [(12, 1.0), (24, 1.01)])
def test_deit_keeps_no_more_than_plain(family: str, depth: int, limit: float) -> None:
    plain = saved("deit_small_patch16_224", 8, 224, depth=depth)
    assert saved(f"{family}_small_{depth}", 8, 224) <= limit * plain


@pytest.mark.slow
@pytest.mark.parametrize("family", ["attnscale", "featscale"])
@pytest.mark.parametrize("img_size, batch_size, limit", [(224, 4, 0.55), (384, 1, 0.45)])
def test_cait_keeps_about_half_of_timms(family: str, img_size: int, batch_size: int, limit: float) -> None:
    plain = saved("cait_xxs24_224", batch_size, img_size)
    assert saved(f"{family}_cait_XXS24_224", batch_size, img_size) <= limit * plain


def test_bytes_saved_count_each_storage_once_and_no_parameter() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.randn(8, 4, requires_grad=True)
    assert benchmark.bytes_saved(layer, lambda: layer(x).sum()) == x.untyped_storage().nbytes()
    assert benchmark.bytes_saved(layer, lambda: (layer(x) + layer(x.view(2, 4, 4)).flatten(0, 1)).sum()) == x.nbytes


def test_macs_of_a_known_model() -> None:
    runner = benchmark.Runner(timm.create_model("deit_tiny_patch16_224"), 1, CPU, None)
    assert count_macs(runner.model, runner.images[:1]) / 1e9 == pytest.approx(
        1.26, rel=0.01
    )  # timm's results: 1.26 GMACs


def test_lambda_is_not_zero() -> None:
    model = benchmark.build("attnfeatscale_tiny_12", 32, CPU, patch_size=8)
    assert all(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lamb" in name)


def test_command_line_compares_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, "scripts/benchmark.py", *SMALL_RUN, "--threads", "1", "--results-file", str(file)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    results = json.loads(file.read_text())
    assert results["machine"]["torch"] == torch.__version__ and "--compare" in results["command"]
    assert [row["model"] for row in results["models"]] == [*SMALL_RUN[1:4]]
    assert results["models"][0]["train_ratio"] == results["models"][0]["saved_ratio"] == 1
    assert all(len(row["infer_rounds_s"]) == 2 and row["train_ms"] > 0 for row in results["models"])
    assert "| attnscale_tiny_12 (2) |" in printed


def test_one_model_has_the_keys_of_timms_benchmark(tmp_path: Path) -> None:
    argv = [
        "--model",
        "attnscale_tiny_12",
        "--img-size",
        "32",
        "-b",
        "4",
        "--num-bench-iter",
        "1",
        "--num-warm-iter",
        "0",
        "--amp-dtype",
        "bfloat16",
        "--model-kwargs",
        "depth=1",
    ]
    result = benchmark.main(benchmark.get_parser().parse_args(argv))["model"]
    assert result["batch_size"] == 4 and result["img_size"] == 32 and result["param_count"] > 0 and result["gmacs"] > 0
    assert result["infer_samples_per_sec"] > 0 and result["train_step_time"] > 0


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = benchmark.Runner.train

    def train(runner: benchmark.Runner) -> None:
        if len(runner.images) > 4:
            raise torch.OutOfMemoryError("no room")  # where a device would run out
        whole(runner)

    monkeypatch.setattr(benchmark.Runner, "train", train)
    argv = [
        "--model",
        "deit_tiny_12",
        "--img-size",
        "32",
        "-b",
        "16",
        "--num-bench-iter",
        "1",
        "--num-warm-iter",
        "0",
        "--model-kwargs",
        "depth=1",
    ]
    args = benchmark.get_parser().parse_args(argv)
    assert benchmark.benchmark_model(args)["batch_size"] == 4
    args.no_retry = True
    with pytest.raises(torch.OutOfMemoryError):
        benchmark.benchmark_model(args)


@pytest.mark.slow
def test_a_table_by_its_name_goes_into_the_results(tmp_path: Path) -> None:
    argv = ["--only", "step", "--quick", "-b", "2", "--results-file", str(tmp_path / "results.json")]
    results = benchmark.main(benchmark.get_parser().parse_args(argv))
    assert {"command", "machine", "step"} == set(json.loads((tmp_path / "results.json").read_text()))
    assert results["step"][-1]["part"] == "all but forward and backward" and results["step"][0]["batch_size"] == 2


def test_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match="--only models,nope: no table nope; there are models, host, step"):
        benchmark.main(benchmark.get_parser().parse_args(["--only", "models,nope"]))


CONVERTED = [
    (plain, tuple(f"{plain}+{names}" for names in ("attnscale", "featscale", "attnscale+featscale")))
    for plain in benchmark_host.COMPARISONS
]


@pytest.mark.parametrize(
    "plain, variants",
    [*benchmark_host.COMPARISONS.items(), *CONVERTED],
    ids=["deit", "cait", "converted deit", "converted cait"],
)
def test_remedies_call_few_more_operators_than_the_plain_model(plain: str, variants: tuple[str, ...]) -> None:
    """On a GPU a small batch waits for the host, whose time goes by the number of operators."""
    counts = [benchmark_host.count_operators(benchmark_host.Step(name)).total() for name in (plain, *variants)]
    attnscale, featscale, both = (count / counts[0] for count in counts[1:])
    assert attnscale < 1.2 and featscale < 1.2 and both < 1.35


def test_host_table_has_a_row_for_every_model() -> None:
    rows = benchmark_host.host_table(argparse.Namespace(amp_dtype="bfloat16", rounds=2, quick=True))
    assert [row["model"] for row in rows][:2] == ["deit_small_patch16_224", "attnscale_small_12"] and len(rows) == 8
    assert all(row["host_ms"] > 0 and row["operators"] > 500 for row in rows)


class Stopped(Exception):
    """Before anything is computed."""


def test_on_cuda_the_defaults_load_the_gpu_and_on_a_cpu_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each benchmark asks for, seen where it builds its first model."""
    asked = {}

    def runner(model: object, batch_size: int, device: torch.device, amp_dtype: str | None, *_: object) -> None:
        asked[device.type] = batch_size, amp_dtype
        raise Stopped

    monkeypatch.setattr(benchmark, "build", lambda *args, **kwargs: None)
    monkeypatch.setattr(benchmark, "Runner", runner)
    cases = [
        (("--device", "cuda", "--compare", "a", "b"), (256, "bfloat16")),
        (("--device", "cuda", "--compare", "a", "b", "--img-size", "384"), (64, "bfloat16")),
        (("--device", "cuda", "--compare", "a", "b", "--quick", "--amp-dtype", "none"), (64, None)),
        (("--device", "cuda:1", "--model", "a"), (256, "bfloat16")),
        (("--device", "cuda", "--model", "a", "-b", "7", "--amp-dtype", "float16"), (7, "float16")),
        (("--compare", "a", "b"), (8, None)),
        (("--compare", "a", "b", "--quick"), (2, None)),
        (("--model", "a"), (64, None)),
    ]
    for words, expected in cases:
        args = benchmark.get_parser().parse_args(words)
        with pytest.raises(Stopped):
            benchmark.benchmark_model(args) if args.model else benchmark.models_table(args)
        assert asked["cuda" if "--device" in words else "cpu"] == expected, words

    def build_step(world: object, *flags: str) -> None:
        asked["step"] = flags[-1]
        raise Stopped

    monkeypatch.setattr(benchmark_step, "build_step", build_step)
    for device, expected in (("cuda", "256"), ("cpu", "64")):
        with pytest.raises(Stopped):
            benchmark_step.step_table(argparse.Namespace(device=device, quick=False))
        assert asked["step"] == expected
    for name in WORKLOADS:
        cpu, cuda = workload(name, "cpu"), workload(name, "cuda")
        assert cuda.batch_size >= 256 and cuda.steps >= 30 > cpu.steps and cuda.warmup >= 5 > cpu.warmup


def test_warming_up_is_not_measured() -> None:
    calls = []
    rounds = benchmark.take_turns([lambda: calls.append(0), lambda: calls.append(1)], 3, CPU, "wall", warmup=2)
    assert len(rounds) == 3 and len(calls) == 2 * (2 + 3)
