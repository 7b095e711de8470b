"""``--spectrum-every``: what it adds to a run's log and curves, and that it changes nothing else."""

import json
from pathlib import Path

import pytest
import torch
from runs import TINY, call_main, tiny_tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoints
from options import ArgumentError, check_args, get_args_parser
from utils import EpochLog

FEATURES = ("hc_dc_attention", "hc_dc_residual", "hc_dc_mlp", "token_similarity")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("data"))


def run(data: Path, folder: Path, *more: str) -> str:
    """A run that writes to ``folder``, with everything that draws at random; returns what it printed."""
    words = ("--lr", "0.05", "--drop", "0.1", "--drop-path", "0.2", "--model-ema-decay", "0.5")
    return call_main(*TINY, "--data-path", str(data), "--output_dir", str(folder), *words, *more).stdout


def spectrum_of(line: dict) -> dict[str, list]:
    return {name: value for name, value in line.items() if name.startswith("spectrum_")}


def test_a_watched_run_is_the_same_run_to_the_last_bit(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "plain", "--epochs", "2")
    run(data, tmp_path / "watched", "--epochs", "2", "--spectrum-every", "1")
    plain, watched = (EpochLog.read(tmp_path / name / "log.txt") for name in ("plain", "watched"))
    assert all(spectrum_of(line) for line in watched)
    assert [{k: v for k, v in line.items() if not k.startswith("spectrum_")} for line in watched] == plain
    states = [checkpoints.read(tmp_path / name / "checkpoint.pth") for name in ("plain", "watched")]
    for part in ("model", "model_ema", "optimizer"):
        torch.testing.assert_close(states[1][part], states[0][part], rtol=0, atol=0)


def test_every_second_epoch_has_a_number_for_each_layer(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, "--epochs", "4", "--spectrum-every", "2")
    log = EpochLog.read(tmp_path / "log.txt")
    names = {f"spectrum_{name}" for name in (*FEATURES, "lamb")}
    assert [set(spectrum_of(line)) for line in log] == [set(), names, set(), names]
    for line in log[1::2]:
        assert all(len(values) == 2 for values in spectrum_of(line).values())
        assert all(-1 <= value <= 1 for value in line["spectrum_token_similarity"])
        assert all(value > 0 for value in line["spectrum_hc_dc_mlp"])
    assert log[1]["spectrum_hc_dc_mlp"] != log[3]["spectrum_hc_dc_mlp"]
    weights = checkpoints.read(tmp_path / "checkpoint.pth")["model"]
    means = [weights[f"blocks.{layer}.attn.lamb"].mean().item() for layer in range(2)]
    assert log[3]["spectrum_lamb"] == pytest.approx(means) and any(means)

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in FEATURES:
        for layer in range(2):
            curve = events.Scalars(f"spectrum_{name}/layer_{layer:02d}")
            assert [event.step for event in curve] == [1, 3]
            assert curve[1].value == pytest.approx(log[3][f"spectrum_{name}"][layer])


def test_cait_is_watched_in_its_patch_blocks(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, "--model", "featscale_cait_S24_224", "--drop", "0", "--spectrum-every", "1")
    (line,) = EpochLog.read(tmp_path / "log.txt")
    assert set(spectrum_of(line)) == {f"spectrum_{name}" for name in (*FEATURES, "lamb1", "lamb2")}
    assert all(len(values) == 2 for values in spectrum_of(line).values())


def test_a_model_that_cannot_be_looked_into_trains_with_one_warning(data: Path, tmp_path: Path) -> None:
    words = ("--model", "test_byobnet", "--model-kwargs", "--drop", "0", "--epochs", "2", "--spectrum-every", "1")
    printed = run(data, tmp_path, *words)
    assert printed.count("--spectrum-every 1 has no effect, --model test_byobnet cannot be looked into") == 1
    log = EpochLog.read(tmp_path / "log.txt")
    assert len(log) == 2 and not any(spectrum_of(line) for line in log)


def test_an_infinite_ratio_is_null_in_the_log(data: Path, tmp_path: Path) -> None:
    """All weights zero but the norms': every token is zero, and so is its mean."""
    words = [*TINY, "--data-path", str(data), "--lr", "0", "--warmup-lr", "0", "--spectrum-every", "1"]
    start = tmp_path / "start"
    call_main(*words, "--output_dir", str(start))
    weights = checkpoints.read(start / "checkpoint.pth")["model"]
    torch.save({"model": {name: torch.zeros_like(value) for name, value in weights.items()}}, tmp_path / "zero.pth")
    call_main(*words, "--min-lr", "0", "--output_dir", str(tmp_path / "run"), "--resume", str(tmp_path / "zero.pth"))
    text = (tmp_path / "run" / "log.txt").read_text()
    (line,) = [json.loads(row, parse_constant=pytest.fail) for row in text.splitlines()]
    assert line["spectrum_hc_dc_attention"] == [None, None]


def test_watching_needs_a_folder_to_write_to() -> None:
    with pytest.raises(ArgumentError, match="--spectrum-every 5 needs --output_dir"):
        check_args(get_args_parser().parse_args(["--spectrum-every", "5"]))
    with pytest.raises(ArgumentError, match="--spectrum-every -1"):
        check_args(get_args_parser().parse_args(["--spectrum-every", "-1", "--output_dir", "logs"]))
