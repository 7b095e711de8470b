"""TensorBoard's pages of a run, and what ``--spectrum-every`` adds to its log and curves; neither changes the run."""

import io
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, call_main, tiny_tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from timm.data import resolve_data_config

import build
import reporting
import utils
from options import ArgumentError, check_args, get_args_parser
from oversmoothing.weights import read_checkpoint
from reporting import EpochLog

FEATURES = ("hc_dc_attention", "hc_dc_residual", "hc_dc_mlp", "token_similarity", "effective_rank")


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
    states = [read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("plain", "watched")]
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
    weights = read_checkpoint(tmp_path / "checkpoint.pth")["model"]
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
    assert printed.count("--spectrum-every 1 has no effect, --model test_byobnet is not supported") == 1
    log = EpochLog.read(tmp_path / "log.txt")
    assert len(log) == 2 and not any(spectrum_of(line) for line in log)


def test_an_infinite_ratio_is_null_in_the_log(data: Path, tmp_path: Path) -> None:
    """All weights zero but the norms': every token is zero, and so is its mean."""
    words = [*TINY, "--data-path", str(data), "--lr", "0", "--warmup-lr", "0", "--spectrum-every", "1"]
    start = tmp_path / "start"
    call_main(*words, "--output_dir", str(start))
    weights = read_checkpoint(start / "checkpoint.pth")["model"]
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


# ---- TensorBoard -----------------------------------------------------------------------------------------------------
def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def hparams_of(events: EventAccumulator, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)


@pytest.mark.parametrize("loader", [(), ("--no-fast-loader",)])
def test_the_sheet_of_samples_shows_the_first_batch_as_training_gets_it(
    loader: tuple, data: Path, tmp_path: Path
) -> None:
    words = (*TINY, "--data-path", str(data), "--batch-size", "12", *loader)
    call_main(*words, "--output_dir", str(tmp_path))
    (event,) = events_of(tmp_path).Images("training_samples")
    sheet = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    zoom, height, width = 3, 96 + reporting.CAPTION_PX, 96 + 2
    assert sheet.shape == (2 * height, 6 * width, 3)

    args = get_args_parser().parse_args([*words])
    cpu = utils.World(0, 0, 1, torch.device("cpu"))
    model = build.build_model(args, 3)
    loaders = build.build_loaders(args, model, cpu)
    images, labels = next(iter(loaders.train))
    utils.seed_everything(args.seed, 0, 0, 0)
    images = images if loaders.prepare is None else loaders.prepare(images)
    config = resolve_data_config({}, model=model)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        tile = sheet[number // 6 * height :, number % 6 * width :][:height, :width]
        shown = torch.from_numpy(tile[1:96:zoom, 2:98:zoom].copy()) / 255  # the middles of the enlarged pixels
        expected = image.permute(1, 2, 0) * torch.tensor(config["std"]) + torch.tensor(config["mean"])
        torch.testing.assert_close(shown, expected.clamp(0, 1), atol=0.6 / 255, rtol=0)
        caption = Image.fromarray(tile[96:])
        others = [Image.fromarray(reporting._contact_sheet(np.zeros((1, 96, 96, 3), np.uint8), [f"class_{n}"])[96:])
                  for n in range(3)]  # fmt: skip
        assert [caption == other for other in others] == [n == label for n in range(3)]


def test_looking_at_samples_changes_no_draw(data: Path, tmp_path: Path) -> None:
    words = (*TINY, "--data-path", str(data), "--epochs", "3", "--lr", "0.05", "--drop", "0.1")
    printed = [call_main(*words, *more).stdout for more in ((), ("--output_dir", str(tmp_path)))]
    plain, looked_at = (re.findall(r"^(?:Averaged stats|\* Acc).*", text, re.MULTILINE) for text in printed)
    assert len(plain) == 6 and plain == looked_at


def test_a_run_is_described_once_and_is_one_row_of_hyper_parameters(data: Path, tmp_path: Path) -> None:
    """Also after it went on: the row shows the accuracies of the last epoch."""
    words = ("--auto_reload", "--model", "featscale_small_12", "--clip-grad", "1")
    run(data, tmp_path, *words, "--epochs", "2", "--spectrum-every", "1")
    run(data, tmp_path, *words, "--epochs", "4", "--spectrum-every", "1")
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["tensorboard"]  # no run within the run
    events = events_of(tmp_path)
    (text,) = events.Tensors("run/text_summary")
    page = text.tensor_proto.string_val[0].decode()
    assert "main.py --model attnscale_small_12" in page and "model: featscale_small_12, " in page
    assert "1 process(es) on CPU" in page and "| `--clip-grad` | `1.0` |" in page and "--momentum" not in page
    assert len(events.Images("training_samples")) == 1

    start = hparams_of(events, "session_start_info").session_start_info.hparams
    assert (start["lr"].number_value, start["clip_grad"].string_value) == (0.05, "1.0")
    assert start["model"].string_value == "featscale_small_12" and start["effective_batch"].number_value == 4
    experiment = hparams_of(events, "experiment").experiment
    assert {info.name for info in experiment.hparam_infos} == set(start)
    assert hparams_of(events, "session_end_info").session_end_info.status  # finished
    log = EpochLog.read(tmp_path / "log.txt")
    shown = {
        info.name.tag: [event.value for event in events.Scalars(info.name.tag)] for info in experiment.metric_infos
    }
    accuracies = [line["test_acc1"] for line in log]
    assert len(log) == 4 and shown == {
        "accuracy/best_test_acc1": pytest.approx([*itertools.accumulate(accuracies, max)]),
        "accuracy/test_acc1": pytest.approx(accuracies),
        "loss/test_loss": pytest.approx([line["test_loss"] for line in log]),
    }


def test_every_chart_of_the_layout_has_curves(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, "--model", "attnfeatscale_small_12", "--spectrum-every", "1", "--eval-ema")
    events = events_of(tmp_path)
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    curves = {
        chart.title: [tag for tag in events.Tags()["scalars"] if any(re.match(p, tag) for p in chart.multiline.tag)]
        for category in layout.category
        for chart in category.chart
    }
    assert sorted(curves["accuracy, %"]) == [f"accuracy/{n}acc1" for n in ("best_test_", "test_", "test_ema_")]
    assert sorted(curves["loss"]) == ["loss/test_ema_loss", "loss/test_loss", "loss/train_loss"]
    assert sorted(curves["lamb"]) == ["remedy_mean/blocks.0.attn.lamb", "remedy_mean/blocks.1.attn.lamb"]
    assert {name for name, tags in curves.items() if len(tags) == 2} > {"lamb", "lamb1", "lamb2"}
    assert all(curves.values()) and len(curves) == 3 + 3 + 5
    groups = {tag.split("/")[0] for tag in events.Tags()["scalars"] if not tag.startswith("spectrum_")}
    assert groups == {"accuracy", "loss", "optimization", "remedy_mean", "time", "efficiency"}


# ---- log.txt as people and other programs leave it ----


@pytest.mark.parametrize(
    ("spoil", "others"),
    [
        (lambda lines: [lines[0], b"", b"   ", *lines[1:]], 0),
        (lambda lines: [b"# my best run", *lines], 1),
        (lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]], 0),
        (lambda lines: [lines[0], lines[1][:20], *lines[1:]], 1),
        (lambda lines: [lines[0], b"3", b'{"note": "lr was 0.1 here"}', b"null", *lines[1:]], 3),
        (lambda lines: [lines[0], "caf\u00e9".encode("latin-1"), *lines[1:]], 1),
        (lambda lines: [lines[0], b"[" * 100_000, b'{"epoch": ' + b"9" * 9999 + b"}", *lines[1:]], 2),
        (lambda lines: [lines[0], b'{"epoch": true}', b'{"epoch": -1}', b'{"epoch": "1"}', *lines[1:]], 3),
        (lambda lines: [lines[1], lines[0], lines[2], b'{"epoch": 3, "test_acc1": null}'], 0),
        (lambda lines: [b'{"epoch": 1, "test_acc1": 99}', *lines], 1),
        (lambda lines: [line + b"\r" for line in lines], 0),
        (lambda lines: [b"\xff\xfe" + "\n".join("ab").encode("utf-16-le"), *lines], 2),
    ],
)
def test_a_log_keeps_its_epochs_and_sets_the_rest_aside(
    spoil: Callable, others: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"epoch": epoch, "test_acc1": 10.0 * epoch} for epoch in range(3)]
    path = tmp_path / "log.txt"
    before = spoil([json.dumps(line).encode() for line in good])
    path.write_bytes(b"\n".join([*before, b'{"epoch": 4, "test_a']))  # the last line was cut short by a kill
    recorder = reporting.Recorder(str(tmp_path), start_epoch=4, fresh=False)
    recorder.finish()
    assert EpochLog.read(path)[:3] == good and recorder.best_acc1 == 20.0
    aside = tmp_path / reporting.OTHER_LINES
    kept = aside.read_bytes().splitlines() if aside.exists() else []
    assert len(kept) == others and all(any(line in text for text in before) for line in kept)
    assert (f"{others} of its lines are no epochs" in caplog.text) == bool(others)


def test_a_log_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(utils.SetupError, match="its log.txt is no file"):
        reporting.Recorder(str(tmp_path), start_epoch=1, fresh=False)
