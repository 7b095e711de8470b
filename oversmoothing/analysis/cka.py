"""Linear CKA: similarity of two layers' features, of one model or of two, independent of width and rotation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from matplotlib.colors import Normalize
from torch import Tensor, nn

from .figures import SEQUENTIAL, Picture, fold, panel_title, panels
from .inputs import Models, by_label, inputs_and_labels
from .pooled import POOLS, pooled_outputs
from .probe import evaluating, find_layers

MINIBATCH = 256
LEAST = 4  # images of a minibatch: the estimator divides by n - 3
MOST_NUMBERS = 24  # layers of a heat map whose cells hold their numbers


def hsic(grams: Tensor) -> Tensor:
    """Unbiased estimates of HSIC between all pairs of linear kernels of the same images.

    Args:
        grams: ``X X^T`` of each of L sets of features, (L, n, n), n >= 4; float64. Centring does not change the
            estimate.

    Returns:
        (L, L), symmetric, in squared units of both features. For independent features the values scatter around 0,
        about half of them negative.

    Source: Song et al., "Feature selection via dependence maximization", JMLR 2012, HSIC_1; used for CKA by Nguyen et
    al., arXiv 2010.15327, equation 3.
    """
    n = grams.shape[-1]
    grams = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    rows = grams.sum(dim=-1)  # (L, n)
    totals = rows.sum(dim=-1)
    flat = grams.flatten(1)
    traces = flat @ flat.T
    return (traces + torch.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


class RunningCKA:
    """Linear CKA between all pairs of L sets of features, from minibatches; memory is independent of the image count.

    The features are regrouped into minibatches of a fixed size, so the result does not depend on the size of the
    batches that arrive. HSIC is estimated without bias on each minibatch and averaged; CKA is the ratio of the
    averages. The alternative, sums of cross-covariances, would need (L C)^2 numbers, and with as few images as features
    its HSIC is far above 0 even for independent features.

    Args:
        minibatch: Images per minibatch, 4 or more; memory is ``L * minibatch^2`` numbers.
    """

    def __init__(self, minibatch: int = MINIBATCH) -> None:
        if minibatch < LEAST:
            raise ValueError(f"minibatch={minibatch}: the unbiased estimate needs {LEAST} images or more")
        self.minibatch = minibatch
        self.count = 0
        self._waiting: list[list[Tensor]] = []
        self._sum: Tensor | float = 0.0

    def update(self, features: Sequence[Tensor]) -> None:
        """Adds the features of B images: L tensors (B, C), of any widths, on one device or several."""
        self._waiting.append([x.detach() for x in features])
        # At least LEAST images stay, enough for a last minibatch.
        while self._num_waiting() >= self.minibatch + LEAST:
            self._add(self.minibatch)

    def result(self) -> Tensor:
        """CKA of all pairs, (L, L), float64, dimensionless.

        1 on the diagonal, and for features that differ by a rotation, a scale and a shift only; around 0, possibly a
        little below, for independent features; nan where features do not differ between images.

        Raises:
            ValueError: If there were fewer than 4 images.

        Source: Kornblith et al., arXiv 1905.00414.
        """
        if self._num_waiting():
            self._add(self._num_waiting())
        own = self._sum.diagonal()
        own = torch.where(own > 0, own, torch.nan)
        return self._sum / torch.outer(own, own).sqrt()

    def _num_waiting(self) -> int:
        return sum(len(batch[0]) for batch in self._waiting)

    def _add(self, n: int) -> None:
        if n < LEAST:
            raise ValueError(f"CKA needs {LEAST} images or more, got {n}")
        joined = [torch.cat([x.double() for x in layer]) for layer in zip(*self._waiting, strict=True)]
        self._waiting = [[x[n:] for x in joined]] if len(joined[0]) > n else []
        # The estimate does not need centring, but common offsets would cost precision.
        centred = (x[:n] - x[:n].mean(dim=0) for x in joined)
        grams = torch.stack([(x @ x.T).cpu() for x in centred])
        self.count += n
        self._sum = self._sum + n * hsic(grams)


@dataclass(frozen=True)
class CKA:
    """CKA between all layers of one model or several."""

    layers: dict[str, list[str]]  # label -> names of the blocks
    values: Tensor  # (L, L) over the layers of all models in this order, dimensionless
    pool: str  # of POOLS
    count: int  # images

    def between(self, first: str, second: str) -> Tensor:
        """Rows: layers of one model; columns: layers of another, or of the same."""
        start, rows = 0, {}
        for label, names in self.layers.items():
            rows[label] = slice(start, start + len(names))
            start += len(names)
        return self.values[rows[first], rows[second]]

    def rows(self) -> Iterable[dict[str, Any]]:
        """Every number as a row of CSV; each pair of models once."""
        for first, second in combinations_with_replacement(self.layers, 2):
            for layer, row in enumerate(self.between(first, second).tolist()):
                for other, value in enumerate(row):
                    yield {
                        "model": first,
                        "layer": layer,
                        "block": self.layers[first][layer],
                        "other_model": second,
                        "other_layer": other,
                        "other_block": self.layers[second][other],
                        "cka": f"{value:.6g}",
                        "count": self.count,
                    }

    def picture(self) -> Picture:
        """Heat maps of all pairs of models."""
        caption = (
            f"Of each block's output, {POOLS[self.pool]}, over {self.count} images (an unbiased estimate, which can "
            "fall a little below 0). 1: the same features up to rotation and scale. A bright square on the diagonal: "
            "blocks that change little. Between two models: which layer of one resembles which layer of the other."
        )
        return Picture("cka.png", "Similarity of layers (linear CKA)", caption, draw_cka(self))


def compare_layers(models: Models, batches: Iterable[Any], *, pool: str = "patches", minibatch: int = MINIBATCH) -> CKA:
    """Linear CKA between the outputs of all blocks, within each model and between models.

    One pass over the images, without gradients; the models' modes are restored. Features are one vector per image.

    Args:
        models: A model, or several by their labels; each of a kind that :func:`probe.find_layers` accepts. Widths and
            numbers of layers may differ.
        batches: See :func:`inputs.inputs_and_labels`; labels are not needed.
        pool: ``patches``, the mean of the patch tokens, or ``class``, the class token.
        minibatch: See :class:`RunningCKA`.

    Raises:
        UnsupportedModelError: If a model has layers that cannot be analysed.
        ValueError: If the pool is unknown, a model has no class token in its blocks, or there are fewer than 4 images.

    Source: Kornblith et al., arXiv 1905.00414; the minibatch estimator: Nguyen et al., arXiv 2010.15327.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r}: give {' or '.join(POOLS)}")
    models = by_label(models)
    running = RunningCKA(minibatch)
    with evaluating(*models.values()):
        for inputs, _ in inputs_and_labels(batches, list(models.values())):
            features = []
            for (label, model), images in zip(models.items(), inputs, strict=True):
                features += _pooled(label, model, images, pool)
            running.update(features)
        values = running.result()
    layers = {label: [layer.name for layer in find_layers(model)] for label, model in models.items()}
    return CKA(layers, values, pool, running.count)


def check_pool(models: Models, images: Iterable[Tensor], pool: str) -> None:
    """Refuses models without what :func:`compare_layers` is to compare, before a pass.

    Args:
        models: As there.
        images: Of each model an input (1, 3, H, W), on its device.
        pool: Of ``POOLS``.

    Raises:
        ValueError: If a model has no class token in its blocks.
    """
    models = by_label(models)
    with evaluating(*models.values()):
        for (label, model), image in zip(models.items(), images, strict=True):
            _pooled(label, model, image, pool)


def _pooled(label: str, model: nn.Module, images: Tensor, pool: str) -> list[Tensor]:
    """One (B, C) for each block."""
    outputs = pooled_outputs(label, model, images, (pool,))
    if not all(pool in output for output in outputs):
        raise ValueError(f"{label} has no class token in its blocks: compare the mean of the patches")
    return [output[pool] for output in outputs]


def draw_cka(cka: CKA) -> Any:
    """One heat map per pair of models, including a model with itself; small ones have the numbers in their cells."""
    pairs = list(combinations_with_replacement(cka.layers, 2))
    pairs.sort(key=lambda pair: pair[0] != pair[1])  # each model with itself, then two with each other
    columns = min(3, len(pairs))
    deepest = max(map(len, cka.layers.values()))
    side = min(max(3.6, 0.36 * deepest), 8.0)
    figure, axes = panels(-(-len(pairs) // columns), columns, width=side + 0.6, height=side)
    figure.set_layout_engine("compressed")  # panels keep their shape, which the layout of the others does not foresee
    scale = Normalize(0, 1)
    for ax, (first, second) in zip(axes.flat, pairs, strict=False):
        table = cka.between(first, second)
        image = ax.imshow(table.numpy(), origin="lower", cmap=SEQUENTIAL, norm=scale, interpolation="nearest")
        panel_title(ax, first if first == second else f"{first} (rows), {second} (columns)", inches=0.75 * side)
        ax.set_xlabel(fold(f"layer of {second}", 0.65 * side))
        ax.set_ylabel(fold(f"layer of {first}", 0.65 * side))
        ax.set_xticks(range(table.shape[1]))
        ax.set_yticks(range(table.shape[0]))
        ax.tick_params(labelsize=min(9, 150 / deepest))
        if max(table.shape) <= MOST_NUMBERS:
            for row, values in enumerate(table.tolist()):
                for column, value in enumerate(values):
                    text = "–" if value != value else f"{value:.2f}".removeprefix("0")
                    colour = "black" if value > 0.55 else "white"
                    ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=min(7, 150 / deepest))
    for ax in axes.flat[len(pairs) :]:
        ax.set_visible(False)
    figure.colorbar(image, ax=axes, label="linear CKA", shrink=0.8)
    return figure
