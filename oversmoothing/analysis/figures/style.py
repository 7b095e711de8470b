"""What the figures of an analysis share: palette, line styles, axes and common panels."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure  # without pyplot: no display and no global state
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from ..results import Result
from .text import figure_title, legend_below, panel_title

PALETTE = rc_params_from_file(Path(__file__).with_name("palette.mplstyle"), use_default_template=False)
COLOURS, MARKERS = (tuple(PALETTE["axes.prop_cycle"].by_key()[key]) for key in ("color", "marker"))
MARKERS += ("*", "<", "p", ">")  # so that lines of the same colour have different ones
SEQUENTIAL, DIVERGING = "cividis", "PuOr_r"
LAYER_AXIS = "layer (block index)"

BANDS = (
    "Lines: means over the images; bands: ± one standard deviation over the images, on logarithmic axes the factor "
    "1 + std/mean up and down."
)


@dataclass(frozen=True)
class Picture:
    """A figure in the report."""

    file: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Drawing:
    """How one figure is drawn from results: one figure for all models, or one per model."""

    name: str  # of the file, without suffix; with ``per_model``, the model's number is added
    title: str
    caption: str
    needs: tuple[str, ...]  # it is drawn where the results have any of these quantities
    draw: Callable[..., Figure | None]  # of all results, or with ``per_model`` of one; None: nothing to show
    per_model: bool = False

    def pictures(self, results: Sequence[Result]) -> list[Picture]:
        """The figures for which there is data, with the file names of the report."""
        if self.per_model:
            parts = [(f"{self.name}_{i}.png", f"{self.title}: {r.label}", r) for i, r in enumerate(results)]
            parts = [part for part in parts if self._is_in(part[-1])]
        else:
            parts = [(f"{self.name}.png", self.title, results)] if any(map(self._is_in, results)) else []
        figures = [(file, title, self.draw(shown)) for file, title, shown in parts]
        return [Picture(file, title, self.caption, figure) for file, title, figure in figures if figure is not None]

    def _is_in(self, result: Result) -> bool:
        return any(name in layer for name in self.needs for layer in result.layers)


def by_layer(ax: Axes, results: Sequence[Result], quantity: str, title: str, ylabel: str, log: bool = False) -> bool:
    """One line per model with a band of one std over the images; returns whether any model has the quantity."""
    drawn = False
    for index, result in enumerate(results):
        layers, mean, std = result.scalars(quantity)
        if layers:
            style = line_style(index)
            ax.plot(layers, mean, label=result.label, **style)
            # On a logarithmic axis the band below is the same factor as above: mean - std may be negative.
            low, high = (mean / (1 + std / mean), mean + std) if log else (mean - std, mean + std)
            ax.fill_between(layers, low, high, color=style["color"], alpha=0.15, linewidth=0)
            drawn = True
    ax.set_title(title, fontsize=10)
    ax.set_ylabel(ylabel)
    if log:
        logarithmic(ax)
    layer_axis(ax, max(len(result.layers) for result in results))
    if not drawn:
        ax.text(0.5, 0.5, "not measured, or not defined", transform=ax.transAxes, ha="center", color="0.4")
    return drawn


def by_head(results: Sequence[Result], quantity: str, label: str, log: bool = False) -> Figure:
    """A heat map of a per-head quantity over layers and heads, one panel per model, on one colour scale."""
    results = [result for result in results if any(quantity in layer for layer in result.layers)]
    figure, axes = panels(1, len(results), width=3.6, height=4.0)
    tables = []
    for result in results:
        rows = [layer[quantity].mean if quantity in layer else torch.empty(0) for layer in result.layers]
        table = torch.full((len(rows), max(len(row) for row in rows)), math.nan)
        for index, row in enumerate(rows):
            table[index, : len(row)] = row
        tables.append(table)
    finite = torch.cat([table[table.isfinite()] for table in tables])
    if log:
        scale = LogNorm(finite[finite > 0].min().item(), finite.max().item())
    else:
        scale = Normalize(finite.min().item(), finite.max().item())
    for ax, result, table in zip(axes.flat, results, tables, strict=True):
        ax.imshow(table.numpy(), aspect="auto", origin="lower", cmap=SEQUENTIAL, norm=scale, interpolation="nearest")
        panel_title(ax, result.label)
        ax.set_xlabel("head")
        ax.set_ylabel(LAYER_AXIS)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    figure.colorbar(ScalarMappable(scale, SEQUENTIAL), ax=axes, label=label)
    return figure


def layer_panels(result: Result, width: float = 2.5, height: float = 2.0, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """One panel per layer with the block's name above it, four or six per row; returns the figure and its panels."""
    depth = len(result.layers)
    columns = min(6 if depth > 12 else 4, depth)
    figure, axes = panels(math.ceil(depth / columns), columns, width, height, **kwargs)
    for index, ax in enumerate(axes.flat):
        if index >= depth:
            ax.set_visible(False)
            continue
        panel_title(ax, result.layer_names[index], fontsize=8)
        if index + columns >= depth:  # panels in the last row of their column
            ax.tick_params(labelbottom=True)
    return figure, list(axes.flat)[:depth]


def patch_panels(result: Result, values: Mapping[int, Tensor], label: str) -> Figure:
    """A map over the grid of patches, (rows, columns), for each layer that has one, on one colour scale from zero."""
    figure, axes = layer_panels(result, width=2.1, height=2.0)
    scale = Normalize(0, max(value.max().item() for value in values.values()))
    for index, ax in enumerate(axes):
        ax.set_xticks([])
        ax.set_yticks([])
        if index not in values:
            ax.text(0.5, 0.5, "left out", transform=ax.transAxes, ha="center", color="0.4")
            continue
        ax.imshow(values[index].numpy(), cmap=SEQUENTIAL, norm=scale, interpolation="nearest")
    figure.supxlabel("columns of patches", fontsize=9)
    figure.supylabel("rows of patches", fontsize=9)
    figure_title(figure, result.label)
    figure.colorbar(ScalarMappable(scale, SEQUENTIAL), ax=axes, label=label, shrink=0.8)
    return figure


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line with this number. Up to 28, lines of one colour differ in both others."""
    # Dashes let the lines below show through: a remedy at lambda = 0 lies exactly on its plain model.
    line = ("-", "--", ":", "-.")[index % 4]
    return dict(
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=line,
        markersize=4,
        linewidth=1.5,
    )


def up_to_one(ax: Axes) -> None:
    """Axis limits of a similarity: from 0 to 1, or to the largest value if all are small."""
    low, high = ax.get_ylim()
    ax.set_ylim(min(0, low), 1.02 if high > 0.4 else high)


def from_zero(ax: Axes) -> None:
    """Axis limits from 0 to a little above the largest value; to 1 if all values are 0."""
    _, high = ax.get_ylim()
    ax.set_ylim(0, 1.08 * high if high > 0 else 1)


def logarithmic(ax: Axes) -> None:
    """Logarithmic axis: ticks 0.2, 0.3, 0.4 on a narrow range, 0.2, 0.5, 1 on a wider one, else powers of ten."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def layer_axis(ax: Axes, depth: int) -> None:
    ax.set_xlabel(LAYER_AXIS)
    ax.set_xlim(-0.6, depth - 0.4)  # no tick for a layer that is not there
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ax.grid(alpha=0.3)


def shared_legend(
    figure: Figure, results: Sequence[Result], quantities: Sequence[str] = (), title: str | None = None
) -> None:
    """The models' line styles, of those that have any of the quantities; without quantities, of all."""
    lines = [
        (result.label, line_style(index))
        for index, result in enumerate(results)
        if not quantities or any(name in layer for name in quantities for layer in result.layers)
    ]
    legend_below(figure, lines, title)


def panels(rows: int, columns: int, width: float = 4.0, height: float = 3.1, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure with a grid of panels, each ``width`` x ``height`` inches; its axes as an array (rows, columns)."""
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)
