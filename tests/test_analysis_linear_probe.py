"""Linear probes: what they find in features whose answer is known, and in a model's layers."""

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import RidgeClassifier

from oversmoothing.analysis import linear_probe
from oversmoothing.analysis.linear_probe import fit_probe, probe_layers, split

VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0)


def classes(count: int, num_classes: int, width: int, distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around one centre a class, ``distance`` standard deviations of the noise from the origin."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, count)
    centres = np.eye(num_classes, width)
    return (distance * centres[labels] + generator.normal(size=(count, width))).astype(np.float32), labels


def test_a_probe_is_a_ridge_classifier_in_closed_form() -> None:
    features, labels = classes(300, 4, 12, 2.0)
    train, held_out = split(labels, seed=3)
    probe = fit_probe(features, labels, train, held_out)
    x = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    targets = 2.0 * np.eye(4)[labels[train]] - 1
    offset = targets.mean(axis=0)
    weights = np.linalg.solve(x[train].T @ x[train] + probe.strength * np.eye(12), x[train].T @ (targets - offset))
    expected = (x[held_out] @ weights + offset).argmax(axis=1) == labels[held_out]
    assert probe.accuracy == pytest.approx(100 * expected.mean()) and probe.low < probe.accuracy < probe.high
    assert probe.strength in linear_probe.STRENGTHS
    again = RidgeClassifier(alpha=probe.strength).fit(x[train], labels[train])
    assert 100 * again.score(x[held_out], labels[held_out]) == pytest.approx(probe.accuracy)


def test_separate_classes_are_found_and_noise_is_chance() -> None:
    for distance, low, high in ((50.0, 100, 100), (0.0, 15, 36)):
        features, labels = classes(400, 4, 20, distance)
        assert low <= fit_probe(features, labels, *split(labels)).accuracy <= high


def test_a_strong_ridge_is_chosen_where_features_outnumber_images() -> None:
    features, labels = classes(60, 2, 300, 2.0)
    train, held_out = split(labels)
    chosen = fit_probe(features, labels, train, held_out)
    assert chosen.strength >= 100


def test_images_are_split_by_seed_and_none_is_in_both_parts() -> None:
    labels = np.arange(40) % 4
    train, held_out = split(labels, seed=1)
    assert sorted([*train, *held_out]) == list(range(40)) and len(held_out) == 20
    assert (split(labels, seed=1)[0] == train).all() and (split(labels, seed=2)[0] != train).any()
    with pytest.raises(ValueError, match="got 7 images of 2: give more images"):
        split(np.arange(7) % 2)
    with pytest.raises(ValueError, match="two classes or more"):
        split(np.zeros(50, dtype=int))


def test_every_layer_of_a_model_gets_its_probes() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT).train()
    labels = torch.arange(40) % 2
    images = torch.randn(40, 3, 32, 32) + 2 * labels[:, None, None, None]  # bright and dark
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    result = probe_layers({"a model": model}, batches)
    assert model.training and (result.num_training, result.num_held_out) == (20, 20)
    for pool in ("patches", "class"):
        curve = result.curve("a model", pool)
        assert [layer for layer, _ in curve] == [0, 1, 2] and curve[0][1].accuracy > 80
    rows = list(result.rows())
    assert len(rows) == 6 and rows[-1]["block"] == "blocks.2" and rows[0]["features"] == "patches"
    picture = result.picture()
    assert [ax.get_title() for ax in picture.figure.axes] == ["mean of the patch tokens", "class token"]
    assert all(2 < ax.get_xlim()[1] < 3 for ax in picture.figure.axes)  # no tick for a layer that is not there
    assert "a model, class token: best in layer" in picture.caption
    flat = timm.create_model("vit_tiny_patch16_224", **VIT | dict(class_token=False, global_pool="avg"))
    assert not probe_layers(flat, batches).curve("VisionTransformer", "class")


def test_labels_are_needed() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"a linear probe needs labels: give batches of \(images, labels\)"):
        probe_layers(model, [images])
    with pytest.raises(ValueError, match=r"labels as a tensor \(2,\) of class indices, got a tensor \(2, 5\)"):
        probe_layers(model, [(images, torch.zeros(2, 5))])
    with pytest.raises(ValueError, match="no batches to analyse"):
        probe_layers(model, [])
