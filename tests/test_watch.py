"""Watching a run: Weights & Biases, efficiency, traces and their operators; none of it changes the run."""

import gzip
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from ranks import Ranks
from runs import TINY, call_main, tiny_tree
from test_resume import assert_same_results
from wandb_files import history, run_of

import efficiency
import entry
import reporting
import writers
from options import ArgumentError, check_args, get_args_parser
from oversmoothing.analysis.cost import count_macs
from reporting import EpochLog
from scripts.prepare_digits import prepare_digits

SIGTERM = 15


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))  # no login of whoever runs the tests


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B reads the environment once a process, until it is torn down."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    yield
    wandb.teardown()


def wandb_files(folder: Path) -> list[Path]:
    """Of a run, one for each attempt, the oldest first."""
    return sorted(path for path in (folder / "wandb").glob("*run-*/*.wandb"))


def steps_of(trace: Path) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    return sorted({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")})


@pytest.mark.slow
def test_a_watched_run_on_two_processes_that_is_killed_and_stopped_is_the_unwatched_one(tmp_path: Path) -> None:
    """One run of W&B with every epoch of log.txt, a trace of each attempt, and not a bit of difference."""
    prepare_digits(tmp_path / "digits", 1, 8)
    for file in sorted((tmp_path / "digits" / "val").rglob("*.png")):
        if int(file.stem) % 6:  # a sixth of them is enough to evaluate
            file.unlink()
    flags = (
        *("--model", "attnscale_small_12", "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"),
        *("--input-size", 32, "--data-set", "FOLDER", "--data-path", tmp_path / "digits", "--batch-size", 16),
        *("--epochs", 3, "--lr", 0.05, "--warmup-epochs", 0, "--drop", 0.1, "--num_workers", 1, "--print-freq", 1),
        *("--device", "cpu", "--eval-ema", "--auto_reload"),
    )
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    for folder in (plain, watched):
        folder.mkdir()
    with Ranks(*flags, "--output_dir", plain, folder=plain) as run:
        run.expect(0)

    flags += ("--log-wandb", "--wandb-project", "digits", "--profile", 2, "--output_dir", watched)
    variables = {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    with Ranks(*flags, folder=watched, variables=variables) as run:
        run.wait_for("Epoch: [1]")
        run.kill()
    with Ranks(*flags, folder=watched, variables=variables) as run:
        run.wait_for("Epoch: [2]")
        run.signal(SIGTERM, 1)
        run.expect(entry.EXIT_PREEMPTED)
    with Ranks(*flags, folder=watched, variables=variables) as run:
        printed = run.expect(0)
    assert_same_results(watched, plain, epochs=3)
    assert "enumerate(DataLoader)" in printed and "aten::mm" in printed and "waiting for data" in printed

    attempts = wandb_files(watched)
    assert [file.stem for file in attempts] == 3 * [f"run-{(watched / 'wandb-id.txt').read_text().strip()}"]
    assert (run_of(attempts[-1]).display_name, run_of(attempts[-1]).project) == ("watched", "digits")
    sent = {}
    for file in attempts:
        for line in history(file):
            seen = sent.setdefault(line["epoch"], {})
            sent[line["epoch"]] |= line
            again = {key for key in seen.keys() & line.keys() if key.startswith(("loss/", "accuracy/", "remedy_"))}
            assert all(seen[key] == line[key] for key in again)  # an epoch that was trained again
    log = EpochLog.read(watched / "log.txt")
    assert sorted(sent) == [line["epoch"] for line in log] == [0, 1, 2]
    for line in log:
        found = sent[line["epoch"]]
        assert {key: found[key] for key in reporting.curves(line)} == reporting.curves(line)
    # Of the clock and of the remedy, which log.txt has not; the kill may have cost those of epoch 0.
    assert 0 < sent[1]["efficiency/waiting_for_data"] < 1 and sent[1]["time/train_images_per_s"] > 0
    assert "remedy_values/blocks.1.attn.lamb.bins" in sent[1]
    first, second = sorted((watched / "profile").iterdir())[:2]
    assert (first.name, second.name) == ("epoch-0-from-step-0.json.gz", "epoch-1-from-step-0.json.gz")
    assert len(steps_of(first)) == len(steps_of(second)) == 2


# ---- Weights & Biases ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_of_wandb_has_the_configuration_and_begins_after_the_loaders_processes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    begun, late = [], []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **known: begun.append(threading.active_count()) or init(**known))
    monkeypatch.setattr(os, "fork", lambda fork=os.fork: late.append(bool(begun)) or fork())
    words = ("--output_dir", str(tmp_path / "run"), "--log-wandb", "--wandb-tags", "a", "b", "--num_workers", "1")
    call_main(*TINY, "--data-path", str(data), *words)
    assert late == [False, False] and len(begun) == 1
    (file,) = wandb_files(tmp_path / "run")
    config = {entry.key: json.loads(entry.value_json) for entry in run_of(file).config.update}
    assert (config["batch_size"], config["effective_batch"], config["model"]) == (4, 4, "attnscale_small_12")
    assert list(run_of(file).tags) == ["a", "b"]
    samples, epoch = history(file)
    assert list(file.parent.rglob("training_samples*.png")) and samples["epoch"] == epoch["epoch"] == 0

    # Another run in the same folder is another run there; the files of the first one are kept.
    call_main(*TINY, "--data-path", str(data), *words)
    (new,) = wandb_files(tmp_path / "run")
    assert run_of(new).run_id != run_of(file_of_earlier(tmp_path / "run")).run_id


def file_of_earlier(folder: Path) -> Path:
    (file,) = wandb_files(folder / "earlier-1")
    return file


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_costs_no_run(
    online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    with caplog.at_level(logging.WARNING):
        writer = writers.WandbWriter(tmp_path, project=None, tags=[], resume_id="mine", config={}, wait_s=1)
    writer.write(0, {"loss/test_loss": 0.5}, {})
    writer.finish()
    writer.wandb.teardown()  # as at the end of a process: finish() may return before the last line is on the disk
    assert "no connection to W&B" in caplog.text and (tmp_path / "wandb-id.txt").read_text() == "mine\n"
    file = next(path for path in wandb_files(tmp_path) if path.parent.name.startswith("offline-run"))
    assert run_of(file).run_id == "mine"
    assert [(line["epoch"], line["loss/test_loss"]) for line in history(file)] == [(0, 0.5)]


def test_a_service_that_fails_later_costs_the_curves_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = writers.WandbWriter(tmp_path, project=None, tags=[], resume_id="", config={})
    run = writer.run
    writer.run = BrokenRun()
    writer.write(0, {"x": 1.0}, {})
    writer.write(1, {"x": 2.0}, {})
    writer.finish()
    run.finish()
    assert caplog.text.count("nothing more is sent to W&B") == 1 and "ConnectionResetError: gone" in caplog.text


class BrokenRun:
    """As a run whose service process was killed."""

    def log(self, values: dict) -> None:
        raise ConnectionResetError("gone")


def test_an_id_that_wandb_refuses_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(writers.SetupError, match="--log-wandb: Run ID cannot contain"):
        writers.WandbWriter(tmp_path, project=None, tags=[], resume_id="a/b", config={})


def test_without_a_login_a_run_ends_with_a_sentence(
    online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(writers.SetupError, match="--log-wandb: .*`wandb login`.*WANDB_MODE=offline"):
        writers.WandbWriter(tmp_path, project=None, tags=[], resume_id="", config={})


@pytest.mark.parametrize("leftover", [False, True])
def test_an_absent_package_is_named_before_data_is_read(
    leftover: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a folder of its runs lies in the path, which Python would import as a package without a file."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if leftover:
        (tmp_path / "wandb").mkdir()
    with pytest.raises(writers.SetupError, match="--log-wandb needs the package wandb: pip install wandb"):
        writers.check_wandb()


def test_flags_that_go_nowhere_are_refused() -> None:
    with pytest.raises(ArgumentError) as refused:
        check_args(get_args_parser().parse_args(["--log-wandb", "--profile", "3"]))
    assert "--log-wandb needs --output_dir" in str(refused.value)
    assert "--profile 3 needs --output_dir" in str(refused.value)
    words = ["--wandb-tags", "a", "b", "--output_dir", "x", "--profile", "-1"]
    with pytest.raises(ArgumentError, match="--wandb-tags a b: no effect without --log-wandb"):
        check_args(get_args_parser().parse_args(words))


# ---- efficiency ------------------------------------------------------------------------------------------------------
def test_model_flops_utilisation_by_hand() -> None:
    model = timm.create_model("deit_tiny_12", num_classes=10)
    cpu = torch.device("cpu")
    macs = count_macs(model, torch.zeros(1, 3, 224, 224))
    use = efficiency.Efficiency(model, 224, cpu, torch.float32)
    assert use.peak is None and "MFU" not in efficiency.describe(use.epoch(10, 2.0, 0.5))
    use.peak = efficiency.peak_flops("NVIDIA A100-SXM4-80GB", torch.bfloat16)
    use.flops = efficiency.training_flops(model, 224, cpu)
    numbers = use.epoch(2000, 4.0, 1.0)
    assert numbers["efficiency/mfu"] == pytest.approx(500 * 3 * 2 * macs / 312e12)
    assert numbers["efficiency/waiting_for_data"] == 0.25 and 1.2e9 < macs < 1.3e9  # 1.26 GMACs: timm's table
    assert efficiency.describe(numbers).startswith("efficiency: MFU 1.2%, 25.0% of the time waiting for data, peak")


@pytest.mark.parametrize(
    ("device", "dtype", "tf32", "teraflops"),
    [
        ("NVIDIA A100-SXM4-40GB", torch.float16, False, 312),
        ("NVIDIA A100 80GB PCIe", torch.float32, True, 156),
        ("NVIDIA A100-PCIE-40GB", torch.float32, False, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4),
        ("NVIDIA H200", torch.bfloat16, False, 989.4),
        ("NVIDIA L4", torch.bfloat16, False, 121),
        ("NVIDIA L40S", torch.bfloat16, False, 362),
        ("Tesla T4", torch.float32, True, 8.1),
        ("Tesla T4", torch.bfloat16, False, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", torch.float16, False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.float16, False, None),
        ("NVIDIA H200 NVL", torch.float16, False, None),
        ("", torch.float32, False, None),
    ],
)
def test_a_peak_is_that_of_the_device_and_the_type_or_unknown(
    device: str, dtype: torch.dtype, tf32: bool, teraflops: float | None
) -> None:
    found = efficiency.peak_flops(device, dtype, tf32=tf32)
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_the_peak_of_memory_is_that_of_this_process() -> None:
    held = torch.ones(50_000_000)
    (kilobytes,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    assert efficiency.peak_memory(held.device) == pytest.approx(int(kilobytes) * 1024, rel=0.02)


# ---- traces ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "grad_accum", "steps"), [(2, 1, ["ProfilerStep#2", "ProfilerStep#3"]), (9, 2, ["ProfilerStep#0", "x"])]
)
def test_a_traced_run_is_the_same_and_short_epochs_are_traced_whole(
    asked: int, grad_accum: int, steps: list[str], data: Path, tmp_path: Path
) -> None:
    words = (*TINY, "--data-path", str(data), "--lr", "0.05", "--drop", "0.1", "--grad-accum", str(grad_accum))
    call_main(*words, "--output_dir", str(tmp_path / "plain"))
    printed = call_main(*words, "--output_dir", str(tmp_path / "traced"), "--profile", str(asked)).stdout
    assert_same_results(tmp_path / "traced", tmp_path / "plain", epochs=1)
    (trace,) = (tmp_path / "traced" / "profile").iterdir()
    assert len(steps_of(trace)) == len(steps)
    assert f"{len(steps)} step(s) traced" in printed and f"wrote {trace}" in printed
