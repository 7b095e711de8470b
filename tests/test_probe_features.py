"""k-NN and linear probes: every number is scikit-learn's on the saved features, on one process and on two."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from runs import Run, expect, free_port, tiny_tree
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from test_scripts import refused
from torch import nn

import models  # noqa: F401 (registers the zoo)
from datasets import DataOptions, build_dataset, split_by_class
from oversmoothing import add_remedy
from scripts import feature_probes, probe_features
from utils import World

CLASSES, TRAIN, VAL = 7, 71, 23  # neither a multiple of two processes nor of the batch
SIZE = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8)
L2 = (1.0, 0.1, 0.01)
FLAGS = (
    *("--k", "1", "10", "20", "100", "--l2", *map(str, L2), "--linear-iterations", "500", "--held-out", "0.3"),
    *("--batch-size", "8", "--num_workers", "0", "--device", "cpu"),
)


def tiny_model(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **(SIZE | {"img_size": 32, "num_classes": CLASSES} | kwargs)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a tree and a checkpoint with a remedy, as a run of ours leaves one; and the flags for it."""
    folder = tmp_path_factory.mktemp("probes")
    tiny_tree(folder / "data", classes=CLASSES, train=TRAIN, val=VAL)
    rng = np.random.default_rng(0)
    for file in sorted((folder / "data").glob("*/*/*")):  # every other label is wrong, or nothing could be
        if rng.random() < 0.5:
            file.rename(file.parent.parent / f"class_{rng.integers(CLASSES)}" / file.name)
    model = add_remedy(tiny_model("deit_small_12"), {"gfsa": {}})
    for number, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.2 if number else 0.1)
    about = {"model": "deit_small_12", "input_size": 32, "model_kwargs": SIZE, "remedy": {"gfsa": {}}}
    ema = {name: tensor * 0.9 for name, tensor in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": ema, "args": about}, folder / "run.pth")
    return folder, ["--resume", str(folder / "run.pth"), "--data-path", str(folder / "data"), *FLAGS]


def probe(words: list[str], output: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs the command in this process; returns its results and what it saved."""
    words = [*words, "--results-file", f"{output}.json", "--save-features", f"{output}.npz"]
    probe_features.main(probe_features.get_parser().parse_args(words))
    return json.loads(Path(f"{output}.json").read_text()), dict(np.load(f"{output}.npz"))


@pytest.fixture(scope="module")
def one_process(case: tuple[Path, list[str]]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return probe(case[1], case[0] / "one")


def test_features_are_those_of_the_model_image_by_image(
    case: tuple[Path, list[str]], one_process: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    results, saved = one_process
    args = probe_features.get_parser().parse_args(case[1])
    model, size = probe_features.build_model(args)
    assert size == 32 and list(results["remedy"]) == ["gfsa"] and results["dim"] == 32
    for split, count in (("train", TRAIN), ("val", VAL)):
        options = DataOptions(data_set="FOLDER", data_path=str(case[0] / "data"), input_size=32)
        evaluation = build_dataset(False, options)[0].transform
        dataset, _ = build_dataset(split == "train", options, transform=evaluation)
        with torch.inference_mode():
            tokens = torch.cat([model.forward_features(image[None]) for image, _ in dataset])
        assert saved[f"{split}_features"].shape == (count, 32)
        np.testing.assert_allclose(saved[f"{split}_features"], tokens[:, 0], rtol=1e-4, atol=1e-5)
        assert saved[f"{split}_labels"].tolist() == [label for _, label in dataset.samples]


def test_minus_one_worker_is_one_for_each_core(case: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_features.utils, "cores_of_process", lambda: 1)
    args = probe_features.get_parser().parse_args([*case[1], "--num_workers", "-1"])
    loaders, _ = probe_features.build_loaders(args, 32, {}, World(0, 0, 1, torch.device("cpu")))
    assert [loader.num_workers for loader in loaders] == [1, 1]


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ((), "the weights themselves are not finite"),
        (("--bank-dtype", "float16"), "take --bank-dtype float32"),
        (("--bank-dtype", "float16", "--amp-dtype", "bfloat16"), "take --bank-dtype and --amp-dtype float32"),
    ],
)
def test_features_that_are_not_finite_advise_precision_only_where_there_is_more(
    flags: tuple[str, ...], advice: str, case: tuple[Path, list[str]], monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = torch.load(case[0] / "run.pth")
    checkpoint["model"]["blocks.1.mlp.fc2.bias"][3] = torch.nan
    torch.save(checkpoint, case[0] / "nan.pth")
    words = (*case[1], "--resume", case[0] / "nan.pth", *flags)
    assert advice in refused(probe_features.cli, words, monkeypatch, capsys)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_sentence_without_flags_of_other_commands(
    workers: int, case: tuple[Path, list[str]], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(case[0] / "data", tmp_path / "data")
    damaged = sorted((tmp_path / "data" / "val").glob("*/*"))[3]
    damaged.write_bytes(damaged.read_bytes()[:60])
    words = (*case[1], "--data-path", tmp_path / "data", "--num_workers", workers, "--no-linear")
    line = refused(probe_features.cli, words, monkeypatch, capsys)
    assert line.startswith(f"error: cannot read image {damaged} (") and line.endswith("): repair or remove it")


def test_knn_is_that_of_scikit_learn(one_process: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    results, saved = one_process
    assert [row["k"] for row in results["knn"]] == [1, 10, 20]  # of 100 there are not as many images
    for row in results["knn"]:
        theirs = KNeighborsClassifier(
            row["k"], metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.07)
        ).fit(saved["train_features"], saved["train_labels"])
        right = accuracy_score(saved["val_labels"], theirs.predict(saved["val_features"]))
        assert row["top1"] == pytest.approx(100 * right, rel=1e-12)
        if row["k"] >= 10:  # with fewer votes most classes have none, and their order is anybody's
            shares = theirs.predict_proba(saved["val_features"])
            top5 = top_k_accuracy_score(saved["val_labels"], shares, k=5, labels=range(CLASSES))
            assert row["top5"] == pytest.approx(100 * top5, rel=1e-12)
    assert len({row["top1"] for row in results["knn"]}) > 1 and 100 / CLASSES < results["knn"][1]["top1"] < 100


def logistic_regression(features: np.ndarray, labels: np.ndarray, l2: float) -> Any:
    """scikit-learn's, and the scaler before it."""
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-8, max_iter=10_000)
    return scaler, model.fit(scaler.transform(features), labels)


def test_the_linear_probe_is_that_of_scikit_learn(one_process: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    results, saved = one_process
    linear, logits, labels = results["linear"], saved["linear_logits"], saved["val_labels"]
    assert linear["top1"] == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)), rel=1e-12)
    top5 = top_k_accuracy_score(labels, logits, k=5, labels=range(CLASSES))
    assert linear["top5"] == pytest.approx(100 * top5, rel=1e-12) and top5 < 1
    train, train_labels = saved["train_features"].astype(np.float64), saved["train_labels"]
    scaler, theirs = logistic_regression(train, train_labels, linear["l2"])
    expected = theirs.decision_function(scaler.transform(saved["val_features"].astype(np.float64)))
    np.testing.assert_allclose(logits - logits.mean(1, keepdims=True), expected, atol=2e-3 * np.abs(expected).max())


def test_the_penalty_is_chosen_on_held_out_training_images(
    one_process: tuple[dict[str, Any], dict[str, np.ndarray]],
) -> None:
    results, saved = one_process
    train, labels = saved["train_features"].astype(np.float64), saved["train_labels"]
    fit_on, held_out = split_by_class(labels, 0.3, seed=0)
    for row, l2 in zip(results["linear"]["sweep"], L2, strict=True):
        scaler, theirs = logistic_regression(train[fit_on], labels[fit_on], l2)
        expected = 100 * theirs.score(scaler.transform(train[held_out]), labels[held_out])
        assert row["l2"] == l2 and row["held_out_top1"] == pytest.approx(expected, rel=1e-12)
    best = max(row["held_out_top1"] for row in results["linear"]["sweep"])
    assert results["linear"]["l2"] == max(r["l2"] for r in results["linear"]["sweep"] if r["held_out_top1"] == best)


@pytest.mark.slow
def test_two_processes_give_the_same(
    case: tuple[Path, list[str]], one_process: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    """Under torch.distributed.launch; neither has as many images as the other."""
    folder, words = case
    output = ["--results-file", f"{folder}/two.json", "--save-features", f"{folder}/two.npz"]
    launch = ["-m", "torch.distributed.launch", f"--master_port={free_port()}", "--nproc_per_node=2"]
    with Run([sys.executable, *launch, "scripts/probe_features.py", *words, *output]) as run:
        printed = expect(run, timeout=300).stdout
    assert printed.count("| probe | top-1 | top-5 |") == 1 and "train features" in printed
    results, saved = json.loads((folder / "two.json").read_text()), np.load(folder / "two.npz")
    for name in ("knn", "linear"):
        expected = one_process[0][name]
        assert results[name] == expected
    for name, expected in one_process[1].items():
        np.testing.assert_allclose(saved[name], expected, rtol=1e-3, atol=1e-4)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the queries, whoever does them, nor of the features."""
    torch.manual_seed(1)
    bank = feature_probes.Features(torch.randn(50, 6), torch.randint(0, 4, (50,)))
    queries = feature_probes.Features(torch.randn(33, 6), torch.randint(0, 4, (33,)))
    expected = feature_probes.knn_correct(bank, queries, [3, 40], classes=4)
    fitted = feature_probes.fit_linear(bank, torch.arange(50), classes=4, l2=0.01, iterations=300)
    monkeypatch.setattr(feature_probes, "QUERIES", 4)
    monkeypatch.setattr(feature_probes, "ROWS", 7)
    found, done = torch.zeros_like(expected), []
    for rank in range(3):
        found += feature_probes.knn_correct(
            bank, queries, [3, 40], classes=4, rank=rank, world_size=3, after_block=done.append
        )
    assert torch.equal(found, expected) and sum(done) == 33 and 0 < expected[0, 0] < 33
    again = feature_probes.fit_linear(bank, torch.arange(50), classes=4, l2=0.01, iterations=300)
    torch.testing.assert_close(again.logits(queries.values), fitted.logits(queries.values), rtol=1e-3, atol=1e-3)
    similar, rows = feature_probes.nearest(queries.values, bank.values, 50)
    assert (similar.diff(dim=1) <= 0).all() and torch.equal(rows.sort(1).values, torch.arange(50).expand(33, 50))


def test_half_precision_halves_the_memory_and_a_weighted_average_is_probed(
    case: tuple[Path, list[str]], one_process: tuple[dict[str, Any], dict[str, np.ndarray]], capsys
) -> None:
    folder, words = case
    half, saved = probe([*words, "--bank-dtype", "float16", "--no-linear"], folder / "half")
    values = one_process[1]["train_features"]
    assert saved["train_features"].dtype == np.float16 and saved["train_features"].nbytes * 2 == values.nbytes
    np.testing.assert_allclose(saved["train_features"], values, rtol=1e-3, atol=1e-3)
    assert half["linear"] is None and "linear_logits" not in saved
    _, of_ema = probe([*words, "--ema", "--no-linear", "--feature", "mean"], folder / "ema")
    assert not np.allclose(of_ema["train_features"], values, atol=1e-2)
    printed = capsys.readouterr().out
    assert f"{(TRAIN + VAL) * 32 * 2 / 2**20:.1f} MiB of memory" in printed and "--k 100: left out" in printed


@pytest.mark.parametrize(
    ("name", "kwargs", "cls", "patches"),
    [
        ("attnscale_small_12", {}, lambda x: x[:, 0], lambda x: x[:, 1:].mean(1)),
        ("cait_XXS24", {}, lambda x: x[:, 0], lambda x: x[:, 1:].mean(1)),
        ("deit_tiny_distilled_patch16_224", {}, lambda x: x[:, 0], lambda x: x[:, 2:].mean(1)),
        ("vit_base_patch16_gap_224", {}, None, lambda x: x.mean(1)),
        (
            "swin_tiny_patch4_window7_224",
            dict(embed_dim=12, depths=(1, 1), num_heads=(1, 2), patch_size=2, window_size=4),
            None,
            lambda x: x.flatten(1, 2).mean(1),
        ),
    ],
)
def test_any_model_has_its_features(name: str, kwargs: dict, cls: Any, patches: Any) -> None:
    if "swin" in name:
        model = timm.create_model(name, img_size=32, **kwargs).eval()
    else:
        model = tiny_model(name, **kwargs)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        tokens = model.forward_features(images)
        torch.testing.assert_close(probe_features.feature_of(model, images, "mean"), patches(tokens))
        if cls is None:
            with pytest.raises(ValueError, match="--feature cls: this model has none"):
                probe_features.feature_of(model, images, "cls")
        else:
            torch.testing.assert_close(probe_features.feature_of(model, images, "cls"), cls(tokens))
        before_head = probe_features.feature_of(model, images, "pre_logits")
        assert before_head.shape == (3, model.num_features)
        if name != "deit_tiny_distilled_patch16_224":  # which has two heads
            head = model.head.fc if "swin" in name else model.head
            torch.testing.assert_close(head(before_head), model(images))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--resume", "{folder}/none.pth"), "none.pth"),
        (("--k", "0"), "--k 0: give a number from 1"),
        (("--l2", "0"), "--l2 0.0: give a number above 0"),
        (("--temperature", "nan"), "--temperature nan"),
        (("--held-out", "1"), "--held-out 1.0"),
        (("--batch-size", "0"), "--batch-size 0"),
        (("--device", "foo"), "--device 'foo'"),
        (("--model", "deit_smal_12"), "neither this zoo nor timm knows it; near: deit_small_12"),
        (("--remedy", "foo"), "foo"),
        (("--pretrained",), "--pretrained exclude each other"),
        (("--data-path", "{folder}/nowhere"), "nowhere does not exist"),
        (("--data-set", "IMNET-V2"), "--data-path"),
        (("--save-features", "{folder}/x.npy"), "x.npy: give a file that ends in .npz"),
        (("--results-file", "/nowhere/x.json"), "--results-file /nowhere/x.json"),
        (("--results-file", "/proc/x.json"), "--results-file /proc/x.json cannot be written"),
        (("--held-out", "0.5", "--data-path", "{folder}/single"), "--held-out 0.5: class 0 has one image"),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple, named: str, case: tuple[Path, list[str]], monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    folder, given = case
    if not (folder / "single").exists():
        tiny_tree(folder / "single", classes=2, train=2, val=2)
    more = [word.format(folder=folder) for word in words]
    assert named in refused(probe_features.cli, (*given, *more), monkeypatch, capsys)
