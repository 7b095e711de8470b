"""Differences between two models, paired by image, by layer, with intervals.

Every image goes through both models, so the variation between images cancels in the difference. The intervals are over
images: these two trained models on other images of the same kind. They say nothing about other training runs of the
same two recipes; scripts/compare.py compares those, over seeds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .values import RunningMean

LEVEL = 0.95  # of the intervals, of all layers of a quantity together
# Quantity -> its name in a sentence. All other quantities are only in the files.
SENTENCES = {
    "token_similarity": "the token similarity",
    "hc_dc_mlp": "the HC/DC ratio",
    "effective_rank": "the effective rank",
}
# Smaller differences are float32 rounding: equal models that run other kernels show them too.
ROUNDING = dict(rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Difference:
    """One quantity in one layer: a model minus the baseline, image by image."""

    mean: float  # in the quantity's unit
    std: float  # over the images, of the sample (n - 1)
    low: float  # interval of the mean, corrected for the number of layers
    high: float
    p: float  # of the paired t test, with the same correction

    @property
    def found(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Differences:
    """A model against the baseline, layer by layer."""

    label: str
    baseline: str
    blocks: list[str]  # of the model
    quantities: dict[str, dict[int, Difference]]  # quantity -> layer -> difference
    count: int  # images

    def sentences(self) -> list[str]:
        """The findings on the quantities of ``SENTENCES``, one sentence each."""
        return [self._sentence(name) for name in SENTENCES if self.quantities.get(name)]

    def _sentence(self, quantity: str) -> str:
        name, layers = SENTENCES[quantity], self.quantities[quantity]
        over = f"over {self.count} images, corrected for {len(layers)} layers"
        if all(difference.mean == 0 == difference.std for difference in layers.values()):
            same = f"the same as {self.baseline}'s in every layer, on each of {self.count} images"
            return f"{_capital(name)} of {self.label} is {same}."
        found = {layer: difference for layer, difference in layers.items() if difference.found}
        layer, largest = max((found or layers).items(), key=lambda item: abs(item[1].mean))
        if not found:
            return (
                f"{_capital(name)} of {self.label} and {self.baseline} does not differ detectably in any layer; the "
                f"largest difference, in layer {layer}, is {_signed(largest.mean)} (95% interval "
                f"{_signed(largest.low)} to {_signed(largest.high)}, {over})."
            )
        size = sorted(abs(end) for end in (largest.low, largest.high))
        verb = "higher" if largest.mean > 0 else "lower"
        return (
            f"In layer {layer} (of 0 to {len(self.blocks) - 1}) {name} of {self.label} is "
            f"{abs(largest.mean):.3g} {verb} than {self.baseline}'s (95% interval {size[0]:.3g} to {size[1]:.3g}, "
            f"{over}); it differs in {len(found)} of {len(layers)} layers, and most in this one."
        )

    def rows(self) -> Iterable[dict[str, Any]]:
        """Every number as a row of CSV."""
        for quantity, layers in self.quantities.items():
            for layer, difference in layers.items():
                yield {
                    "model": self.label,
                    "baseline": self.baseline,
                    "layer": layer,
                    "block": self.blocks[layer],
                    "quantity": quantity,
                    "difference": f"{difference.mean:.8g}",
                    "std": f"{difference.std:.8g}",
                    "low": f"{difference.low:.8g}",
                    "high": f"{difference.high:.8g}",
                    "p": f"{difference.p:.4g}",
                    "count": self.count,
                }


class PairedDifferences:
    """Running mean and variance of one model's quantities minus another's, image by image; memory is fixed.

    Quantities per head are averaged over the heads, quantities per window (Swin's maps) over the windows of an image.
    Quantities with a spectrum are left out.
    """

    def __init__(self) -> None:
        self.count = 0
        self.layers: dict[tuple[str, int], RunningMean] = {}

    def update(self, ours: Sequence[Mapping[str, Tensor]], theirs: Sequence[Mapping[str, Tensor]], images: int) -> None:
        """Adds the images of a batch: for each layer, quantity -> (images or windows, ...), of both models."""
        self.count += images
        for layer, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            for name in mine.keys() & other.keys():
                a, b = _by_image(mine[name], images), _by_image(other[name], images).to(mine[name].device)
                difference = torch.where(torch.isclose(a, b, **ROUNDING), 0, a - b)
                self.layers.setdefault((name, layer), RunningMean()).update(difference)

    def result(self, label: str, baseline: str, blocks: list[str]) -> Differences:
        """Means with Student's t intervals, corrected for the number of layers of a quantity (Bonferroni).

        Args:
            label: Of the model.
            baseline: Label of the baseline.
            blocks: Names of the model's layers.

        Raises:
            ValueError: For fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"differences between models need two images or more, got {self.count}")
        quantities: dict[str, dict[int, Difference]] = {}
        for (name, layer), running in self.layers.items():
            mean, std = running.mean.item(), running.std.item() * math.sqrt(self.count / (self.count - 1))
            if math.isfinite(mean) and math.isfinite(std):  # HC/DC is not finite if the mean token is zero
                quantities.setdefault(name, {})[layer] = Difference(mean, std, math.nan, math.nan, math.nan)
        for layers in quantities.values():
            for layer, difference in layers.items():
                layers[layer] = _tested(difference.mean, difference.std, self.count, len(layers))
        return Differences(label, baseline, blocks, quantities, self.count)


def _tested(mean: float, std: float, count: int, tests: int) -> Difference:
    """A paired t test from the mean and the std of the differences, with Bonferroni correction for ``tests`` tests."""
    from scipy.stats import t  # imported here: nothing else in measuring needs scipy

    error = std / math.sqrt(count)
    if error == 0:
        return Difference(mean, std, mean, mean, 1.0 if mean == 0 else 0.0)
    low, high = t.interval(1 - (1 - LEVEL) / tests, count - 1, mean, error)
    p = min(1.0, tests * 2 * t.sf(abs(mean) / error, count - 1))
    return Difference(mean, std, float(low), float(high), float(p))


def _by_image(values: Tensor, images: int) -> Tensor:
    """(images or windows, ...) -> (images,), in double precision."""
    return values.detach().double().reshape(images, -1).mean(dim=1)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _signed(value: float) -> str:
    return f"{value:+.3g}"
