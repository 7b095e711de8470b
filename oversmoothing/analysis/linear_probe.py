"""Linear probes: from which layer's features can a linear classifier tell the class of an image?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .figures import Picture, layer_axis, legend_below, line_style, panels
from .inputs import Models, by_label, inputs_and_labels
from .pooled import POOLS, pooled_outputs
from .probe import evaluating, find_layers

STRENGTHS = tuple(10.0**power for power in range(-2, 6))  # of the ridge, on standardised features
HELD_OUT = 0.5  # share of the images that accuracy is measured on
LEAST = 4  # images per class, on average


@dataclass(frozen=True)
class Probe:
    """A linear classifier on one layer's features."""

    accuracy: float  # of the held-out images, in %
    low: float  # 95% interval of the accuracy (Wilson) over images, in %
    high: float
    strength: float  # of the ridge


@dataclass(frozen=True)
class LinearProbes:
    """For each model, one probe per layer and kind of features."""

    layers: dict[str, list[str]]  # label -> names of the blocks
    probes: dict[str, list[dict[str, Probe]]]  # label -> layer -> pool (of POOLS) -> probe
    num_training: int  # images
    num_held_out: int
    chance: float  # accuracy of always predicting the most frequent class of the training images, in %

    def curve(self, label: str, pool: str) -> list[tuple[int, Probe]]:
        """The layers of a model that have these features, with their probes."""
        return [(layer, found[pool]) for layer, found in enumerate(self.probes[label]) if pool in found]

    def rows(self) -> Iterable[dict[str, Any]]:
        """Every number as a row of CSV."""
        for label, layers in self.probes.items():
            for layer, found in enumerate(layers):
                for pool, probe in found.items():
                    yield {
                        "model": label,
                        "layer": layer,
                        "block": self.layers[label][layer],
                        "features": pool,
                        "accuracy": f"{probe.accuracy:.6g}",
                        "low": f"{probe.low:.6g}",
                        "high": f"{probe.high:.6g}",
                        "strength": f"{probe.strength:g}",
                        "training_images": self.num_training,
                        "held_out_images": self.num_held_out,
                    }

    def picture(self) -> Picture:
        """Accuracy by layer."""
        sentences = []
        for label in self.probes:
            for pool in POOLS:
                if curve := self.curve(label, pool):
                    best, last = max(curve, key=lambda item: item[1].accuracy), curve[-1]
                    sentences.append(
                        f"{label}, {POOLS[pool]}: best in layer {best[0]} ({best[1].accuracy:.1f}%), "
                        f"{last[1].accuracy:.1f}% in the last"
                    )
        caption = (
            f"Ridge classifiers on standardised block outputs, fitted on {self.num_training} images, accuracy on "
            f"{self.num_held_out} others; bands: 95% intervals over these images (Wilson). Dotted: always the most "
            "frequent class. A curve that falls towards the last layer loses what earlier layers held. "
            f"{'; '.join(sentences)}. The best layer is picked on the images that are shown."
        )
        return Picture("linear_probe.png", "Class information by layer (linear probes)", caption, draw_probes(self))


def probe_layers(models: Models, batches: Iterable[Any], *, seed: int = 0) -> LinearProbes:
    """Accuracy of a linear classifier on the output of every block, measured on held-out images.

    Half of the images, drawn by ``seed``, are held out. The classifier is fitted on the others; leave-one-out errors
    choose the strength of the ridge. The models are only read; their modes are restored. Features are one vector per
    image and layer, kept in float32: 4 bytes x images x layers x channels, and twice that with a class token (10,000
    images through DeiT-S: 370 MB).

    Args:
        models: A model, or several by their labels; each of a kind that :func:`probe.find_layers` accepts.
        batches: Of (images, labels), see :func:`inputs.inputs_and_labels`.
        seed: Of the split.

    Raises:
        UnsupportedModelError: If a model has layers that cannot be analysed.
        ValueError: If there are no labels, fewer than two classes, or fewer than four images per class on average.

    Source: Alain and Bengio, arXiv 1610.01644, with a ridge classifier in closed form (scikit-learn's).
    """
    models = by_label(models)
    features: dict[str, list[dict[str, list[torch.Tensor]]]] = {}
    labels = []
    with evaluating(*models.values()):
        for inputs, targets in inputs_and_labels(batches, list(models.values()), "a linear probe"):
            labels.append(targets.cpu())
            for (label, model), images in zip(models.items(), inputs, strict=True):
                outputs = pooled_outputs(label, model, images, tuple(POOLS))
                kept = features.setdefault(label, [{} for _ in outputs])
                for layer, output in zip(kept, outputs, strict=True):
                    for pool, values in output.items():
                        layer.setdefault(pool, []).append(values.cpu())
    y = torch.cat(labels).numpy()
    train, held_out = split(y, seed)
    probes = {
        label: [
            {pool: fit_probe(torch.cat(parts).numpy(), y, train, held_out) for pool, parts in layer.items()}
            for layer in layers
        ]
        for label, layers in features.items()
    }
    chance = 100 * float((y[held_out] == np.bincount(y[train]).argmax()).mean())
    names = {label: [layer.name for layer in find_layers(model)] for label, model in models.items()}
    return LinearProbes(names, probes, len(train), len(held_out), chance)


def split(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to fit on and of the held-out images, drawn by ``seed``.

    Raises:
        ValueError: If there are too few classes, or too few images for them.
    """
    count, classes = len(labels), len(np.unique(labels))
    order = np.random.default_rng(seed).permutation(count)
    num_held_out = round(HELD_OUT * count)
    train, held_out = order[num_held_out:], order[:num_held_out]
    if count < LEAST * classes or len(np.unique(labels[train])) < 2:
        raise ValueError(
            f"a linear probe needs two classes or more and {LEAST} images of each on average, got {count} images of "
            f"{classes}: give more images (--num-images)"
        )
    return train, held_out


def fit_probe(features: np.ndarray, labels: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Probe:
    """Fits one probe and measures its accuracy.

    Args:
        features: Shape (images, C).
        labels: Shape (images,), class indices.
        train: Indices of the images to fit on. The squared leave-one-out error on them chooses the ridge's strength.
        held_out: Indices of the images to measure on.
    """
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=STRENGTHS))
    classifier.fit(features[train].astype(np.float64), labels[train])
    right = classifier.predict(features[held_out]) == labels[held_out]
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    percent = (100 * float(share) for share in (right.mean(), interval.low, interval.high))
    return Probe(*percent, float(classifier[-1].alpha_))


def draw_probes(result: LinearProbes) -> Any:
    """Accuracy by layer, one panel per kind of features, one line per model."""
    pools = [pool for pool in POOLS if any(result.curve(label, pool) for label in result.probes)]
    figure, axes = panels(1, len(pools), width=4.6, height=3.4, sharey=True)
    for ax, pool in zip(axes.flat, pools, strict=True):
        for index, label in enumerate(result.probes):
            _line(ax, result.curve(label, pool), index)
        ax.axhline(result.chance, color="0.4", linewidth=0.9, linestyle=":")
        ax.set_title(POOLS[pool], fontsize=10)
        layer_axis(ax, max(map(len, result.layers.values())))
        ax.set_ylabel("held-out accuracy (%)")
        ax.tick_params(labelleft=True)
    legend_below(figure, [(label, line_style(index)) for index, label in enumerate(result.probes)])
    return figure


def _line(ax: Any, curve: Sequence[tuple[int, Probe]], index: int) -> None:
    if not curve:
        return
    layers, probes = zip(*curve, strict=True)
    style = line_style(index)
    ax.plot(layers, [probe.accuracy for probe in probes], **style)
    low, high = [probe.low for probe in probes], [probe.high for probe in probes]
    ax.fill_between(layers, low, high, color=style["color"], alpha=0.15, linewidth=0)
