"""One run, start to end: what it refuses and how, where it begins, what it trains and what it leaves behind."""

import argparse
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import timm
import torch
from conftest import golden_json
from PIL import Image
from runs import ROOT, TINY, call_main, run_main, tiny_tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.layers import DropPath
from torch import nn

import build
import entry
import main
import models
import optim
import oversmoothing
import utils
from datasets import DataError
from options import check_args, get_args_parser
from oversmoothing.weights import ModelError, load_weights, read_checkpoint
from reporting import EpochLog
from utils import World

CPU = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
SIZE = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=32)
PLAIN = ("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--aa", "none", "--reprob", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a plain model that was trained for two epochs; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    call_main(*flags(data, folder, "--model", "deit_small_12", "--epochs", "2", "--model-ema-decay", "0.5"))
    return folder


def flags(data: Path, folder: Path | None = None, *more: str) -> list[str]:
    """Flags of a run on ``data`` that writes to ``folder``; later flags win."""
    return [*TINY, "--data-path", str(data), *(["--output_dir", str(folder)] if folder else []), *map(str, more)]


def parse(*words: str) -> argparse.Namespace:
    return get_args_parser().parse_args([*map(str, words)])


def tiny_model(name: str = "attnscale_small_12", classes: int = 3, **kwargs: object) -> nn.Module:
    return timm.create_model(name, num_classes=classes, **(SIZE | kwargs))


def weights_of(folder: Path, key: str = "model") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoint.pth")[key]


# ---- files and flags that cannot be used -----------------------------------------------------------------------------
def _text(path: Path) -> None:
    path.write_text("see the other folder\n")


def _image(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, format="JPEG")


def _truncated(path: Path) -> None:
    torch.save({"model": tiny_model().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-3000])


def _folder(path: Path) -> None:
    path.mkdir()


BROKEN: dict[str, Callable[[Path], None]] = {
    "text": _text, "image": _image, "truncated": _truncated, "empty": Path.touch, "folder": _folder,
    "missing": lambda path: None,
}  # fmt: skip


def assert_one_clear_line(text: str, *named: str) -> None:
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    for part in named:
        assert part in errors[0]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_checkpoint_is_one_clear_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    BROKEN[kind](path)
    done = call_main("--model", "attnscale_small_12", "--eval", "--resume", path, code=2)
    assert done.stderr.count("\n") == 1
    assert_one_clear_line(done.stderr, str(path))
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_text_file_is_one_clear_line_of_a_real_process(tmp_path: Path) -> None:
    _text(tmp_path / "x.pth")
    words = ["--model", "attnscale_small_12", "--eval", "--resume", tmp_path / "x.pth"]
    assert_one_clear_line(run_main(*words, code=2).stdout, str(tmp_path / "x.pth"), "a text file")


@pytest.mark.parametrize(
    ("name", "other"),
    [("attnscale_small_12", "featscale_small_12"), ("deit_small_12", "attnscale_small_12"),
     ("attnscale_small_12", "cait_XXS24"), ("attnscale_small_12", "resnet18")],
)  # fmt: skip
def test_a_checkpoint_of_another_architecture_is_one_clear_line(
    name: str, other: str, data: Path, tmp_path: Path
) -> None:
    """A model never ignores the parameters of a remedy that it does not have."""
    model = timm.create_model(other, num_classes=3) if other == "resnet18" else tiny_model(other)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    done = call_main(*flags(data, None, "--model", name, "--eval", "--resume", tmp_path / "x.pth"), code=2)
    assert done.stderr.count("\n") == 1
    assert_one_clear_line(done.stderr, str(tmp_path / "x.pth"), "unexpected", "another --model")


def test_an_unknown_model_comes_with_near_names(data: Path) -> None:
    done = call_main(*flags(data, None, "--model", "attnscale_smal_12"), code=2)
    assert_one_clear_line(done.stderr, "--model attnscale_smal_12", "attnscale_small_12", "--list-models")


@pytest.mark.parametrize("words", [["no_such_argument=1"], ["embed_dim=33"]])
def test_impossible_model_kwargs_are_one_clear_line(words: list[str], data: Path) -> None:
    done = call_main(*flags(data, None, "--model-kwargs", *words), code=2)
    assert_one_clear_line(done.stderr, "--model-kwargs", words[0].split("=")[0])


def test_an_unknown_optimizer_or_schedule_is_one_clear_line(data: Path) -> None:
    assert_one_clear_line(call_main(*flags(data, None, "--opt", "adamx"), code=2).stderr, "--opt adamx")
    assert_one_clear_line(call_main(*flags(data, None, "--sched", "cosin"), code=2).stderr, "--sched cosin")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda_is_one_clear_line(data: Path) -> None:
    done = call_main(*flags(data, None, "--device", "cuda"), code=2)
    assert_one_clear_line(done.stderr, "--device cuda", "--device auto")
    assert "device: cpu (--device auto)" in call_main(*flags(data, None, "--device", "auto")).stdout


def test_all_problems_of_the_flags_are_reported_before_anything_is_read() -> None:
    words = ["--data-path", "/nowhere", "--batch-size", "3", "--epochs", "0", "--resume", "/no/file", "--drop", "-1"]
    done = call_main(*words, code=2)
    assert done.stdout == ""
    for part in ("--batch-size 3 is odd", "--epochs 0", "--drop -1"):
        assert part in done.stderr


@pytest.mark.parametrize("missing", ["", "train", "val"])
def test_missing_data_are_named(missing: str, tmp_path: Path) -> None:
    data = tiny_tree(tmp_path / "data", train=3, val=3)
    (data / missing).rename(tmp_path / "elsewhere")
    done = call_main(*flags(data), code=2)
    assert_one_clear_line(done.stderr, str(data))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    data = tiny_tree(tmp_path)
    bad = data / "train" / "class_0" / "0000.jpeg"
    bad.write_bytes(bad.read_bytes()[:100])
    assert_one_clear_line(call_main(*flags(data, None, "--no-repeated-aug"), code=2).stderr, str(bad))


# ---- the model -------------------------------------------------------------------------------------------------------
def test_list_models_prints_the_zoo_and_needs_nothing_else() -> None:
    printed = call_main("--list-models").stdout.split()
    assert printed == models.list_models()
    assert {"attnscale_small_12", "featscale_base_24", "attnfeatscale_cait_XXS24", "cait_M48"} <= set(printed)


@pytest.mark.parametrize(
    "name",
    ["attnscale_small_12", "featscale_small_24", "our_small_12", "deit_small_patch16_224", "attnscale_cait_S24_224",
     "featscale_cait_S24_224", "cait_XXS24_224"],
)  # fmt: skip
def test_drop_and_drop_path_act_where_the_papers_code_has_them(name: str) -> None:
    """Neither on the attention weights, nor before the head, nor in CaiT's class-attention blocks."""
    golden = golden_json("dropout_placement.json")[name]
    ours = name.replace("our_", "deit_")
    args = parse("--model", ours, "--drop", golden["drop"], "--drop-path", golden["drop_path"])
    with torch.device("meta"):
        model = build.build_model(args, 1000)

    rates = {n: module.p for n, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert set(rates.values()) <= {0.0, 0.2}
    expected = {module for module, rate in golden["dropout_modules"] if rate > 0}
    # timm has two modules where the paper's code calls mlp.drop twice.
    assert {re.sub(r"mlp\.drop[12]$", "mlp.drop", n) for n, rate in rates.items() if rate > 0} == expected
    assert sum(rate > 0 for rate in rates.values()) == len(expected) + sum("mlp" in module for module in expected)

    paths = {n: module.drop_prob for n, module in model.named_modules() if isinstance(module, DropPath)}
    for module, rate, _ in golden["drop_path_modules"]:
        found = [paths.get(f"{module}{suffix}") for suffix in ("", "1", "2")]
        assert [value for value in found if value] == pytest.approx([rate] * (2 if found[1] else bool(rate)), rel=1e-6)


def test_the_input_size_reaches_the_model_and_the_images(data: Path) -> None:
    words = [word if word != "32" else "64" for word in flags(data)]
    printed = call_main(*words).stdout
    assert "at 64 px" in printed
    model = build.build_model(parse("--model", "cait_XXS24_224", "--input-size", "64"), 3)
    assert model.pos_embed.shape == (1, 16, 192)
    # A model without a fixed image size gets none.
    assert build.build_model(parse("--model", "resnet18", "--input-size", "64", "--drop-path", "0"), 3).num_classes == 3


def test_throughput_prints_a_rate_and_reads_no_data() -> None:
    words = [word for word in TINY if word not in ("--data-set", "FOLDER")]
    printed = call_main(*words, "--data-path", "/nowhere", "--throughput", "--batch-size", "2").stdout
    assert re.search(r"throughput of attnscale_small_12: [1-9]\d*\.\d images/s \(batch 2, 32 px, ", printed)


def head(classes: int) -> build.Start:
    return build.Start("x.pth", {"model": {"head.weight": torch.zeros(classes, 4)}})


@pytest.mark.parametrize(
    ("words", "start", "expected"),
    [
        (["--data-set", "FOLDER"], build.Start(), 3),
        (["--data-set", "FOLDER", "--num-classes", "9"], build.Start(), 9),
        (["--data-set", "IMNET"], build.Start(), 3),  # counted, not assumed
        (["--data-set", "IMNET", "--resume", "x.pth"], head(1000), 1000),  # a part of ImageNet for ImageNet's model
        (["--data-set", "IMNET", "--resume", "x.pth"], head(21841), 3),  # then loading fails, and says so
        (["--data-set", "IMNET", "--finetune", "x.pth"], head(1000), 3),
        (["--data-set", "FOLDER", "--resume", "x.pth"], head(1000), 3),
        (["--data-set", "FOLDER", "--resume", "x.pth", "--num-classes", "9"], head(1000), 9),
        (["--throughput"], build.Start(), 1000),
        (["--throughput", "--resume", "x.pth"], head(10), 10),
    ],
)
def test_the_class_count_of_the_head(words: list[str], start: build.Start, expected: int, data: Path) -> None:
    assert build.num_classes(parse("--data-path", data, *words), start) == expected


def test_classes_that_differ_between_train_and_val_are_named(tmp_path: Path) -> None:
    data = tiny_tree(tmp_path)
    (data / "val" / "class_1").rename(data / "val" / "class_7")
    with pytest.raises(DataError, match="class_"):
        build.num_classes(parse("--data-path", data, "--data-set", "FOLDER"), build.Start())


# ---- where a run begins ----------------------------------------------------------------------------------------------
def test_auto_reload_continues_and_wins_over_resume(data: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.pth"
    torch.save({"model": tiny_model().state_dict()}, start)
    words = flags(data, tmp_path / "run", "--auto_reload", "--resume", start)
    assert f"{start}: weights only, training starts at epoch 0" in call_main(*words).stdout

    printed = call_main(*words, "--epochs", "2").stdout
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    assert f"auto-reload: continuing from {checkpoint} (--resume {start} is ignored)" in printed
    assert "Epoch: [0]" not in printed and "Epoch: [1]" in printed
    assert [line["epoch"] for line in EpochLog.read(tmp_path / "run" / "log.txt")] == [0, 1]

    before = checkpoint.read_bytes()
    abandoned = tmp_path / "run" / "checkpoint.pth.0123abcd.tmp"  # of a last save that was killed
    abandoned.write_bytes(before)
    assert "nothing left to train" in call_main(*words, "--epochs", "2").stdout
    assert not abandoned.exists()
    assert before == checkpoint.read_bytes()


def test_a_resumed_run_equals_an_uninterrupted_one(trained: Path, data: Path, tmp_path: Path) -> None:
    """The schedule too: with the flags of the longer run from the start."""
    words = flags(data, tmp_path / "whole", "--epochs", "3", "--lr", "0.05", "--model-ema-decay", "0.9")
    call_main(*words)
    parts = flags(data, tmp_path / "parts", "--epochs", "3", "--lr", "0.05", "--model-ema-decay", "0.9")
    call_main(*parts, "--keep-checkpoints", "3")
    for name in ("checkpoint.pth", "checkpoint_prev.pth", "checkpoint_0002.pth", "checkpoint_0001.pth"):
        (tmp_path / "parts" / name).unlink()
    assert "Epoch: [1]" in call_main(*parts, "--auto_reload").stdout
    for key in ("model", "model_ema"):
        whole, continued = (weights_of(tmp_path / name, key) for name in ("whole", "parts"))
        torch.testing.assert_close(continued, whole, rtol=0, atol=0)
    logs = [EpochLog.read(tmp_path / name / "log.txt") for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_a_run_with_layer_decay_resumes_exactly_and_logs_the_heads_rate(data: Path, tmp_path: Path) -> None:
    words = ("--layer-decay", "0.5", "--epochs", "2", "--lr", "0.05", "--warmup-epochs", "1", "--no-model-ema")
    printed = call_main(*flags(data, tmp_path / "whole", *words)).stdout
    assert "LR by layer, stem to head, in parts of the plan: 0.125  0.25  0.5  1\n" in printed
    call_main(*flags(data, tmp_path / "parts", *words, "--keep-checkpoints", "2"))
    for name in ("checkpoint.pth", "checkpoint_prev.pth", "checkpoint_0001.pth"):
        (tmp_path / "parts" / name).unlink()
    assert "Epoch: [1]" in call_main(*flags(data, tmp_path / "parts", *words, "--auto_reload")).stdout
    torch.testing.assert_close(weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole"), rtol=0, atol=0)
    args = parse(*flags(data, None, *words))
    plan = optim.LRPlan(args, world_size=1)
    rates = [line["train_lr"] for line in EpochLog.read(tmp_path / "parts" / "log.txt")]
    assert rates == pytest.approx([plan(epoch) for epoch in range(args.epochs)]) and plan(0) > 0


def test_a_run_with_a_rate_for_each_step_resumes_exactly_within_an_epoch(data: Path, tmp_path: Path) -> None:
    """Three optimizer steps an epoch, of two, two and one batches; the last checkpoint but one is after the second."""
    words = ("--sched-on-updates", "--scale-min-lr", "--epochs", "2", "--lr", "0.5", "--warmup-epochs", "1")
    words += ("--batch-size", "2", "--grad-accum", "2", "--checkpoint-steps", "2", "--no-model-ema")
    data = tiny_tree(tmp_path / "data", train=10)
    printed = call_main(*flags(data, tmp_path / "whole", *words)).stdout
    assert "LR at the first step of epoch: 0: " in printed and "--min-lr and --warmup-lr scaled likewise" in printed
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoint.pth").unlink()
    saved = read_checkpoint(tmp_path / "parts" / "checkpoint_prev.pth")
    assert (saved["epoch"], saved["step"]) == (0, 4)
    assert "Epoch: [1]  [4/5]" in call_main(*flags(data, tmp_path / "parts", *words, "--auto_reload")).stdout
    torch.testing.assert_close(weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole"), rtol=0, atol=0)
    logs = [EpochLog.read(tmp_path / name / "log.txt") for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    plan = optim.LRPlan(parse(*flags(data, None, *words)), world_size=1, steps_per_epoch=3)
    means = [(2 * plan(epoch, 0) + 2 * plan(epoch, 1) + plan(epoch, 2)) / 5 for epoch in (0, 1)]
    assert [line["train_lr"] for line in logs[0]] == pytest.approx(means)
    assert plan(1, 0) == pytest.approx(0.5 * 4 / 512 * 2 / 3, rel=1e-3), "the warm-up has three steps"


def test_a_plain_training_state_given_to_a_variant_is_a_fine_tune(trained: Path, data: Path, tmp_path: Path) -> None:
    """Weights only, from epoch 0, and said so; at the start the variant computes what the plain model does."""
    source = trained / "checkpoint.pth"
    words = flags(data, tmp_path / "run", "--model", "attnscale_small_12", "--resume", source, "--lr", "0")
    printed = call_main(*words, "--warmup-lr", "0", "--min-lr", "0").stdout
    assert f"{source}: weights only, training starts at epoch 0" in printed
    assert "left at initial value: blocks.*.attn.lamb (2)" in printed
    plain, variant = EpochLog.read(trained / "log.txt")[-1], EpochLog.read(tmp_path / "run" / "log.txt")[-1]
    assert variant["epoch"] == 0
    assert variant["test_acc1"] == plain["test_acc1"]
    assert variant["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-5)


def test_resume_of_a_finished_run_says_so(trained: Path, data: Path) -> None:
    words = flags(data, None, "--model", "deit_small_12", "--resume", trained / "checkpoint.pth", "--epochs", "2")
    printed = call_main(*words).stdout
    assert "nothing left to train" in printed and "Epoch: [" not in printed


def test_finetune_takes_other_classes_and_another_image_size(trained: Path, tmp_path: Path) -> None:
    data = tiny_tree(tmp_path / "five", classes=5, train=10, val=5)
    words = [word if word != "32" else "64" for word in flags(data, tmp_path / "run")]
    printed = call_main(*words, "--finetune", trained / "checkpoint.pth").stdout
    assert "dropped head (3 classes in the file, 5 in the model)" in printed
    assert "interpolated pos_embed from 4x4 to 8x8" in printed
    assert "weights only, training starts at epoch 0" in printed
    # As --resume the same file is refused, and the message knows the way out.
    refused = call_main(*words, "--resume", trained / "checkpoint.pth", code=2)
    assert_one_clear_line(refused.stderr, "--finetune")


def test_a_fine_tune_trains_with_drop_path(trained: Path) -> None:
    """DeiT's fine-tuning runs in evaluation mode; ours does not (the paper's recipe is --resume anyway)."""
    model = tiny_model("deit_small_12", drop_path_rate=0.5)
    load_weights(model, weights_of(trained), source="x", finetune=True)
    assert model.train().blocks[1].drop_path1.training


def test_a_distilled_checkpoint_fine_tunes_a_plain_model(data: Path, tmp_path: Path) -> None:
    student = tiny_model("deit_tiny_distilled_patch16_224")
    torch.save({"model": student.state_dict()}, tmp_path / "student.pth")
    words = flags(data, None, "--model", "deit_tiny_12", "--finetune", tmp_path / "student.pth")
    assert "dropped dist_token and head_dist" in call_main(*words).stdout


def test_a_folder_with_an_earlier_run_loses_nothing(data: Path, tmp_path: Path) -> None:
    """Without --auto_reload a run in the same folder starts anew; the earlier one is moved aside."""
    call_main(*flags(data, tmp_path))
    earlier = {name: (tmp_path / name).read_bytes() for name in ("log.txt", "checkpoint.pth", "best_checkpoint.pth")}
    events = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    printed = call_main(*flags(data, tmp_path, "--seed", "1")).stdout
    assert "held an earlier run: moved to" in printed and "--auto_reload would continue it" in printed
    for name, content in earlier.items():
        assert (tmp_path / "earlier-1" / name).read_bytes() == content
    assert sorted(path.name for path in (tmp_path / "earlier-1" / "tensorboard").iterdir()) == events
    assert len(EpochLog.read(tmp_path / "log.txt")) == 1

    call_main(*flags(data, tmp_path, "--seed", "2"))
    assert (tmp_path / "earlier-2" / "log.txt").exists()


# ---- the EMA ----------------------------------------------------------------------------------------------
def test_the_average_starts_from_the_loaded_weights_not_from_random_ones(data: Path, tmp_path: Path) -> None:
    model = tiny_model("attnscale_small_12")
    torch.save({"model": model.state_dict()}, tmp_path / "start.pth")
    words = flags(data, tmp_path / "run", "--resume", tmp_path / "start.pth", "--model-ema-decay", "1")
    call_main(*words, "--lr", "0.1")
    torch.testing.assert_close(weights_of(tmp_path / "run", "model_ema"), dict(model.state_dict()), rtol=0, atol=0)
    assert not torch.equal(weights_of(tmp_path / "run")["head.weight"], model.state_dict()["head.weight"])


def test_the_average_is_restored_on_resume(trained: Path) -> None:
    saved = read_checkpoint(trained / "checkpoint.pth")
    assert not torch.equal(saved["model_ema"]["head.weight"], saved["model"]["head.weight"])
    args = parse("--resume", trained / "checkpoint.pth")
    start, model = build.find_start(args), tiny_model("deit_small_12")
    start = build.load_start(args, start, model, CPU)
    assert start.full and start.epoch == 2
    ema = build.build_ema(args, start, model)
    torch.testing.assert_close(dict(ema.module.state_dict()), saved["model_ema"], rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), saved["model"], rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, step",
    [
        *(((), 1), (("--no-fast-loader",), 1)),
        *((flags.split(), 0) for flags in ("--seed 1", "--repeated-aug-local", "--no-repeated-aug")),
    ],
    ids=str,
)
@pytest.mark.parametrize("knows_the_flag", [True, False])
def test_an_epoch_starts_again_if_its_steps_were_drawn_in_another_way(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: tuple, step: int, knows_the_flag: bool
) -> None:
    saved = dict(read_checkpoint(trained / "checkpoint.pth")) | {"epoch": 0, "step": 1, "meters": {"0": {}}}
    del saved["format"]  # only with it is a digest expected
    if not knows_the_flag:
        saved["args"] = {name: value for name, value in saved["args"].items() if name != "repeated_aug_local"}
    torch.save(saved, tmp_path / "within.pth")
    args = parse("--resume", tmp_path / "within.pth", "--batch-size", 4, *change)
    start = build.load_start(args, build.find_start(args), tiny_model("deit_small_12"), CPU)
    assert (start.epoch, start.step) == (1, step)
    assert ("epoch 1 starts again" in caplog.text) == (step == 0)


def test_no_average_saves_and_resumes(data: Path, tmp_path: Path) -> None:
    words = flags(data, tmp_path, "--auto_reload", "--no-model-ema")
    call_main(*words)
    assert read_checkpoint(tmp_path / "checkpoint.pth")["model_ema"] is None
    assert "Epoch: [1]" in call_main(*words, "--epochs", "2").stdout
    # An average that is switched on later begins at the weights of that moment.
    assert "Epoch: [2]" in call_main(*words[:-1], "--epochs", "3", "--model-ema-decay", "0.5").stdout
    assert read_checkpoint(tmp_path / "checkpoint.pth")["model_ema"] is not None


def test_eval_ema_logs_both_accuracies(data: Path, tmp_path: Path) -> None:
    printed = call_main(*flags(data, tmp_path, "--eval-ema")).stdout
    assert "Accuracy of the network on" in printed and "Accuracy of the EMA on" in printed
    (line,) = EpochLog.read(tmp_path / "log.txt")
    assert {"test_loss", "test_acc1", "test_acc5", "test_ema_loss", "test_ema_acc1", "test_ema_acc5"} <= line.keys()

    checkpoint = tmp_path / "checkpoint.pth"
    printed = call_main(*flags(data, None, "--eval", "--eval-ema", "--resume", checkpoint)).stdout
    assert f"Accuracy of the EMA on the 7 test images: {line['test_ema_acc1']:.3f}%" in printed
    assert f"Accuracy of the network on the 7 test images: {line['test_acc1']:.3f}%" in printed

    torch.save({"model": read_checkpoint(checkpoint)["model"]}, tmp_path / "bare.pth")
    done = call_main(*flags(data, None, "--eval", "--eval-ema", "--resume", tmp_path / "bare.pth"), code=2)
    assert_one_clear_line(done.stderr, "--eval-ema", "bare.pth")


# ---- evaluation without weights --------------------------------------------------------------------------------------
def test_an_evaluation_that_finds_no_weights_is_refused(data: Path, tmp_path: Path) -> None:
    """A mistyped folder must not become the accuracy of random weights."""
    words = flags(data, tmp_path / "typo", "--eval", "--auto_reload")
    assert_one_clear_line(call_main(*words, code=2).stderr, f"--output_dir {tmp_path / 'typo'} holds no checkpoint")
    assert not (tmp_path / "typo").exists()


def test_an_evaluation_of_a_new_head_is_refused(trained: Path, tmp_path: Path) -> None:
    five = tiny_tree(tmp_path, classes=5, train=5, val=5)
    words = flags(five, None, "--model", "deit_small_12", "--eval", "--finetune", trained / "checkpoint.pth")
    assert_one_clear_line(call_main(*words, code=2).stderr, "--eval --finetune", "3 classes, the model 5")


def test_an_evaluation_of_weights_that_are_not_finite_says_so(data: Path, trained: Path, tmp_path: Path) -> None:
    weights = dict(weights_of(trained)) | {"head.bias": torch.full((3,), torch.nan)}
    torch.save(weights, tmp_path / "broken.pth")
    done = call_main(*flags(data), "--eval", "--resume", tmp_path / "broken.pth")
    assert "the network's loss on these images is not finite" in done.stdout + done.stderr
    assert '"loss": null' in done.stdout


def test_an_evaluation_takes_any_batch_size(trained: Path, data: Path) -> None:
    words = flags(data, None, "--model", "deit_small_12", "--eval", "--resume", trained / "checkpoint.pth")
    results = {re.search(r"\* Acc@1.*", call_main(*words, "--batch-size", size).stdout)[0] for size in ("1", "5", "8")}
    assert len(results) == 1


# ---- loader processes ------------------------------------------------------------------------------------------------
def test_loader_processes_are_forked_before_there_are_threads(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork copies the locks of other threads and the ends of their pipes; with the process group threads begin."""
    forks, joined, threads = [], [], threading.active_count()
    monkeypatch.setattr(
        os, "fork", lambda fork=os.fork: forks.append((bool(joined), threading.active_count())) or fork()
    )
    join = utils.process_group

    def process_group(*given: object) -> AbstractContextManager[World]:
        joined.append(True)
        return join(*given)

    monkeypatch.setattr(utils, "process_group", process_group)
    call_main(*flags(data, tmp_path, "--num_workers", "2", "--checkpoint-steps", "2"))
    assert forks == 4 * [(False, threads)]  # two processes for training, two for evaluation


# ---- training --------------------------------------------------------------------------------------------------------
def test_accumulated_batches_equal_one_bigger_batch(data: Path, tmp_path: Path) -> None:
    """Same images, same learning rate, same steps: the losses and the weights agree to float32's rounding."""
    common = [*PLAIN, "--epochs", "3", "--lr", "0.05", "--warmup-epochs", "0", "--no-repeated-aug"]
    call_main(*flags(data, tmp_path / "big", *common, "--batch-size", "8"))
    call_main(*flags(data, tmp_path / "parts", *common, "--batch-size", "2", "--grad-accum", "4"))
    big, parts = (EpochLog.read(tmp_path / name / "log.txt") for name in ("big", "parts"))
    for key in ("train_loss", "train_lr", "test_loss", "test_acc1"):
        assert [line[key] for line in parts] == pytest.approx([line[key] for line in big], rel=2e-4)
    assert big[0]["train_loss"] - big[-1]["train_loss"] > 0.01  # it did train
    torch.testing.assert_close(weights_of(tmp_path / "parts"), weights_of(tmp_path / "big"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_on_cpu(dtype: str, data: Path, tmp_path: Path) -> None:
    words = flags(data, tmp_path, *PLAIN, "--epochs", "4", "--lr", "0.2", "--auto_reload")
    assert f"precision: {dtype}" in call_main(*words, "--amp-dtype", dtype).stdout
    log = EpochLog.read(tmp_path / "log.txt")
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    # Loss scaling belongs to float16 alone, and its state is part of the checkpoint.
    scaler = read_checkpoint(tmp_path / "checkpoint.pth")["scaler"]
    assert (scaler is not None and scaler["scale"] > 0) if dtype == "float16" else scaler is None
    assert "Epoch: [4]" in call_main(*words, "--amp-dtype", dtype, "--epochs", "5").stdout


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_loss(tmp_path: Path) -> None:
    data = tiny_tree(tmp_path / "data", val=6)  # one batch: no recompilation for a smaller last one
    words = [*PLAIN, "--lr", "0.05", "--model-kwargs", "embed_dim=32", "depth=1", "num_heads=2", "patch_size=8"]
    call_main(*flags(data, tmp_path / "eager", *words))
    call_main(*flags(data, tmp_path / "compiled", *words, "--torchcompile"))
    eager, compiled = (EpochLog.read(tmp_path / name / "log.txt") for name in ("eager", "compiled"))
    for key in ("train_loss", "test_loss"):
        assert [line[key] for line in compiled] == pytest.approx([line[key] for line in eager], rel=1e-3)
    assert weights_of(tmp_path / "compiled").keys() == weights_of(tmp_path / "eager").keys()


def test_gradient_checkpointing_changes_no_number(data: Path, tmp_path: Path) -> None:
    words = [*PLAIN, "--lr", "0.05"]
    call_main(*flags(data, tmp_path / "plain", *words))
    call_main(*flags(data, tmp_path / "recomputed", *words, "--grad-checkpointing"))
    torch.testing.assert_close(weights_of(tmp_path / "recomputed"), weights_of(tmp_path / "plain"))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_distilled_student_learns_from_a_teacher(kind: str, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("resnet10t", num_classes=3)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    words = flags(data, tmp_path, "--model", "deit_tiny_distilled_patch16_224", "--distillation-type", kind)
    words += ["--teacher-model", "resnet10t", "--teacher-path", str(tmp_path / "teacher.pth"), "--lr", "0.05"]
    call_main(*words)
    (line,) = EpochLog.read(tmp_path / "log.txt")
    assert math.isfinite(line["train_loss"])
    before = tiny_model("deit_tiny_distilled_patch16_224").state_dict()
    after = weights_of(tmp_path)
    assert after.keys() == before.keys()
    assert after["head_dist.bias"].abs().max() > 0 and after["head.bias"].abs().max() > 0  # both heads learned


def test_distillation_says_what_it_needs(data: Path, tmp_path: Path) -> None:
    words = ["--distillation-type", "soft", "--teacher-path", "/no/such/file", "--teacher-model", "resnet10t"]
    done = call_main(*flags(data, None, *words), code=2)
    assert_one_clear_line(done.stderr, "--model attnscale_small_12", "deit_*_distilled_*")
    done = call_main(*flags(data, None, "--model", "deit_tiny_distilled_patch16_224", *words), code=2)
    assert_one_clear_line(done.stderr, "/no/such/file")


@pytest.mark.parametrize(
    "words",
    [["--mixup", "0"], ["--cutmix", "0"], ["--mixup", "0", "--cutmix", "0"], ["--smoothing", "0", *PLAIN[:4]],
     ["--mixup", "0", "--cutmix", "0", "--cutmix-minmax", "0.2", "0.8"], ["--mixup-mode", "elem"],
     ["--mixup-mode", "pair"], ["--aa", "none"], ["--aa", ""], ["--no-repeated-aug"],
     ["--train-interpolation", "random"],
     ["--opt", "sgd"], ["--opt", "lamb", "--clip-grad", "1"], ["--opt-betas", "0.9", "0.95"], ["--sched", "step"],
     ["--lr-noise", "0", "1"], ["--model", "cait_XXS24"], ["--model", "attnfeatscale_small_12", "--drop", "0.1"]],
    ids=" ".join,
)  # fmt: skip
def test_a_recipe_trains(words: list[str], data: Path) -> None:
    printed = call_main(*flags(data, None, *words)).stdout
    assert "Accuracy of the network on the 7 test images" in printed


def test_clip_grad_zero_is_no_clipping(data: Path, tmp_path: Path) -> None:
    for name, words in {"zero": ["--clip-grad", "0"], "none": [], "tiny": ["--clip-grad", "1e-9"]}.items():
        call_main(*flags(data, tmp_path / name, *PLAIN, "--opt", "sgd", "--lr", "1", *words))
    torch.testing.assert_close(weights_of(tmp_path / "zero"), weights_of(tmp_path / "none"), rtol=0, atol=0)
    assert not torch.equal(weights_of(tmp_path / "tiny")["head.weight"], weights_of(tmp_path / "none")["head.weight"])


@pytest.mark.parametrize("images", [1, 2, 5])
def test_a_tiny_data_set_trains(images: int, tmp_path: Path) -> None:
    """Fewer images than a batch, than 256, than anything the paper's sampler can take."""
    data = tiny_tree(tmp_path / "data", classes=min(images, 2), train=images, val=2)
    words = ["--batch-size", "64"] if images > 1 else ["--batch-size", "64", "--mixup", "0", "--cutmix", "0"]
    printed = call_main(*flags(data, tmp_path / "run", *words, "--epochs", "2")).stdout
    assert f"--batch-size 64 -> {images - images % 2 if images > 1 else 1}" in printed
    assert len(EpochLog.read(tmp_path / "run" / "log.txt")) == 2


def test_a_single_image_cannot_be_mixed(tmp_path: Path) -> None:
    data = tiny_tree(tmp_path / "data", classes=1, train=1, val=1)
    assert_one_clear_line(call_main(*flags(data), code=2).stderr, str(data), "--mixup 0 --cutmix 0")


def test_one_process_sees_another_order_every_epoch(data: Path) -> None:
    args = parse(*flags(data))
    loader = build.build_loaders(args, tiny_model(), CPU).train
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append([index for index, _ in loader.sampler])
    assert orders[0] == orders[2] != orders[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(data: Path, tmp_path: Path) -> None:
    words = flags(data, tmp_path, *PLAIN, "--auto_reload")
    call_main(*words)
    before = weights_of(tmp_path)
    done = call_main(*words, "--epochs", "3", "--opt", "sgd", "--lr", "1e30", "--opt-betas", "0.9", "0.99", code=None)
    assert done.returncode in (2, 3)  # 2: another optimizer's state is refused
    done = call_main(*words, "--epochs", "3", "--lr", "1e30", code=3)
    assert_one_clear_line(done.stderr, "not finite", "--auto_reload")
    torch.testing.assert_close(weights_of(tmp_path), before, rtol=0, atol=0)


# ---- what a run leaves behind ----------------------------------------------------------------------------------------
def test_the_log_and_the_first_lines(data: Path, tmp_path: Path) -> None:
    printed = call_main(*flags(data, tmp_path, "--epochs", "2")).stdout
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]
    keys = {"train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"}
    assert all(json.loads(line).keys() == keys for line in lines)
    model = tiny_model()
    assert json.loads(lines[0])["n_parameters"] == sum(p.numel() for p in model.parameters())

    head = printed.splitlines()[:7]
    assert re.match(r"python 3\.\d+\.\d+, torch .+, torchvision .+, timm .+; revision ", head[0])
    assert head[1].startswith("arguments: {") and json.loads(head[1].removeprefix("arguments: "))["epochs"] == 2
    assert re.match(r"model: attnscale_small_12, [\d,]+ parameters \(4 of them the remedy's\), .* GFLOPs", head[2])
    assert "effective batch: 4 images; 4 batches an epoch" in printed
    assert "LR plan: base 3.906e-06 = 0.0005 x 4 images x 1 accumulated x 1 process(es) / 512" in printed
    assert re.search(r"^Epoch: \[0\]  \[0/4\]  eta: .*loss: .*images/s: ", printed, re.MULTILINE)
    assert "Max accuracy: " in printed and "Training time " in printed


def test_the_arguments_are_saved_as_they_were_given(data: Path, tmp_path: Path) -> None:
    """Not the scaled learning rate."""
    call_main(*flags(data, tmp_path, "--lr", "0.001"))
    args = read_checkpoint(tmp_path / "checkpoint.pth")["args"]
    assert (args["lr"], args["batch_size"], args["world_size"]) == (0.001, 4, 1)


def test_tensorboard_holds_the_curves_and_every_lambda(data: Path, tmp_path: Path) -> None:
    call_main(*flags(data, tmp_path, "--model", "attnfeatscale_small_12", "--epochs", "2"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    curves = {"loss/train_loss", "loss/test_loss", "accuracy/test_acc1", "accuracy/test_acc5"}
    curves |= {"accuracy/best_test_acc1", "optimization/lr", "time/train_images_per_s"}
    curves |= {"efficiency/waiting_for_data", "efficiency/peak_memory_gb"}
    lambdas = {
        n for n, _ in tiny_model("attnfeatscale_small_12").named_parameters() if oversmoothing.is_remedy_parameter(n)
    }
    assert len(lambdas) == 6
    assert set(tags["histograms"]) == {f"remedy_values/{name}" for name in lambdas}
    assert curves | {f"remedy_mean/{name}" for name in lambdas} == set(tags["scalars"])
    for tag in tags["scalars"]:
        assert [event.step for event in events.Scalars(tag)] == [0, 1]
    log = EpochLog.read(tmp_path / "log.txt")
    assert [event.value for event in events.Scalars("optimization/lr")] == pytest.approx(
        [line["train_lr"] for line in log]
    )


def test_evaluating_a_runs_checkpoint_says_nothing_of_training(data: Path, trained: Path) -> None:
    """With another batch size too: only a run that is continued depends on it."""
    words = ("--model", "deit_small_12", "--eval", "--resume", trained / "checkpoint.pth", "--batch-size", "8")
    printed = call_main(*flags(data, None, *words)).stdout
    assert "Accuracy of the network" in printed and "WARNING" not in printed and "starts at epoch" not in printed


def test_nothing_is_written_without_an_output_folder(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    call_main(*flags(data))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = call_main(*flags(data, tmp_path / "file" / "run"), code=2)
    assert_one_clear_line(done.stderr, f"--output_dir {tmp_path / 'file' / 'run'}")
    assert_one_clear_line(call_main(*flags(data, tmp_path / "file"), code=2).stderr, "is a file: give a folder")


def test_argument_errors_are_not_system_exits() -> None:
    """``build`` can be used from Python."""
    with pytest.raises(ModelError, match="no such model"):
        build.check_model_names(parse("--model", "no_such_model"))


def test_main_is_a_table_of_contents() -> None:
    """No longer than a screen and a half."""
    text = (ROOT / "main.py").read_text()
    body = text.split("def main(")[1].split("\n\n\ndef ")[0]
    assert len(body.splitlines()) <= 75


def test_too_little_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"
        )

    monkeypatch.setattr(main, "main", run)
    monkeypatch.setattr("sys.argv", ["main.py"])
    assert main.cli() == entry.EXIT_BAD_INPUT
    assert "lower --batch-size" in capsys.readouterr().err


def test_the_checkpoint_is_dropped_before_training() -> None:
    start = build.Start("x.pth", {"model": {}, "model_ema": {}, "optimizer": {}, "data": 3})
    build.release_weights(start)
    assert start.checkpoint == {"data": 3}
    build.release_weights(build.Start())


@pytest.mark.parametrize(
    ("given", "cores", "processes", "named"),
    [("10", 24, 10, "24 CPU cores for each process, 10 of them load images"), ("-1", 24, 24, ""), ("0", 24, 0, "")]
    + [("10", 8, 10, ""), ("10", 10, 10, "")],
)
def test_loader_processes_are_as_given_and_idle_cores_are_named(
    given: str,
    cores: int,
    processes: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(utils, "cores_of_process", lambda: cores)
    caplog.set_level("INFO")
    args = get_args_parser().parse_args(["--num_workers", given])
    check_args(args)
    assert build.loader_processes(args) == processes
    assert (named in caplog.text) if named else not caplog.text
