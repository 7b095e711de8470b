"""The data and step benchmarks run and report what they should; no test holds a time."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import tiny_tree

from scripts import benchmark_data, benchmark_step
from utils import World


def test_photographs_are_different_jpeg_files_of_the_size_asked_for(tmp_path: Path) -> None:
    benchmark_data.make_photographs(tmp_path, 6)
    files = sorted(tmp_path.glob("train/*/*.jpg"))
    assert len({file.read_bytes() for file in files}) == 6
    assert all(Image.open(file).size == benchmark_data.SIZE for file in files)
    assert 50_000 < sum(file.stat().st_size for file in files) / 6 < 150_000


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads the workers' processor time from Linux's /proc")
def test_the_data_table_compares_all_sources_and_loaders_and_names_their_stages(capsys: pytest.CaptureFixture) -> None:
    rows = benchmark_data.data_table(Namespace(quick=True, images=16, rounds=1, batch_size=8))
    loaders = {row["loader"]: row for row in rows if "ratio" in row}
    sources = ("archive", "wds", "wds 400 px")
    assert list(loaders) == ["plain", "fast", *(f"{source}{fast}" for source in sources for fast in ("", " fast"))]
    assert loaders["plain"]["ratio"] == 1
    assert all(row["images_per_core_s"] > 0 for row in loaders.values())
    stages = {(row["loader"], row["stage"]) for row in rows if "stage" in row}
    assert {("plain", "RandomErasing"), ("fast", "RandomResizedCropOfFile"), ("fast", "collate")} <= stages
    assert ("wds, remote", "fetch (cat), index") in stages
    assert ("fast", "open, decode (of these)") in stages
    printed = capsys.readouterr().out
    assert "| archive fast |" in printed and "| RandAugment |" in printed


def test_the_shares_of_a_sample_are_those_of_its_stages() -> None:
    plain = {"open, decode": 4, "RandomResizedCropAndInterpolation": 2, "RandAugment": 1, "Normalize": 2, "collate": 1}
    fast = {"open": 1, "RandomResizedCropOfFile": 5, "RandAugment": 2, "to_bytes": 2, "open, decode (of these)": 4}
    stages = [("plain", plain), ("fast", fast | {"device's part, on this CPU": 7})]
    rows = [dict(loader=name, stage=stage, ms=ms) for name, times in stages for stage, ms in times.items()]
    assert benchmark_data.share_rows(rows) == [
        ["plain", "4.00 (40%)", "2.00 (20%)", "1.00 (10%)", "3.00 (30%)", "10.00"],
        ["fast", "4.00 (40%)", "2.00 (20%)", "2.00 (20%)", "2.00 (20%)", "10.00"],
    ]


def test_a_users_images_are_measured_from_a_tree_or_an_archive(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "tree", train=30, val=3)
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", tree)
    found = []
    for number, source in enumerate((tree, Path(archive))):
        benchmark_data.copy_images(source, tmp_path / f"copy-{number}", 10)
        sets = benchmark_data.build_sets(tmp_path / f"copy-{number}", tmp_path / f"packed-{number}", shard_images=4)
        found.append({name: [label for _, label in dataset.samples] for name, dataset in sets.items()})
    assert found[0] == found[1] and len(found[0]) == 8
    assert all(labels == [0] * 4 + [1] * 3 + [2] * 3 for labels in found[0].values())


def test_the_parts_of_a_step_add_up_to_it() -> None:
    tiny = ["embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"]
    flags = ["--model", "attnscale_small_12", "--batch-size", "4", "--input-size", "32", "--model-kwargs", *tiny]
    cpu = torch.device("cpu")
    trainer, batches = benchmark_step.build_step(World(0, 0, 1, cpu), *flags)
    timeline = benchmark_step.Timeline(cpu)
    timeline.watch(trainer)
    trainer.ema.timeline = timeline
    seconds = benchmark_step.run_steps(trainer, batches, 3, after_step=lambda done: timeline.stamp("rest"))
    assert set(timeline.seconds) == {
        "copy to the device",
        "normalisation, erasing",
        "mixup",
        "forward",
        "loss",
        "backward",
        "optimizer",
        "scaler, zero_grad",
        "EMA",
        "rest",
    }
    assert sum(timeline.seconds.values()) >= 0.5 * seconds


def test_the_step_table_ends_with_the_share_that_is_not_the_models(capsys: pytest.CaptureFixture) -> None:
    settings = dict(quick=True, device="cpu", model="attnscale_tiny_12", batch_size=2, steps=1)
    rows = benchmark_step.step_table(Namespace(**settings))
    *parts, rest = rows
    assert rest["part"] == "all but forward and backward"
    others = sum(row["share"] for row in parts if row["part"] not in benchmark_step.FORWARD_BACKWARD)
    assert rest["share"] == pytest.approx(others)
    assert "all but forward and backward" in capsys.readouterr().out
