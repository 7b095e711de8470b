"""The figure of the remedies' parameters."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from ..results import Result, parameters_of
from .style import COLOURS, Picture, layer_axis, line_style, panels, shared_legend

MOST_HEADS = 32  # a longer vector is drawn as a band, not number by number
TITLE = "λ by layer"
CAPTION = (
    "Lines: means over heads or channels. AttnScale: each head is a point. FeatScale: the band spans the 10th to "
    "90th percentile of the channels. At λ = 0 a remedy is absent."
)


def draw_parameters(results: Sequence[Result]) -> Figure | None:
    """The remedies' parameters by layer: every head of per-head parameters, else the spread over channels."""
    titles = {"lamb": "AttnScale: λ of each head", "lamb1": "FeatScale: λ₁ (DC)", "lamb2": "FeatScale: λ₂ (high-pass)"}
    present = list(parameters_of(results))
    if not present:
        return None
    figure, axes = panels(1, len(present))
    for ax, name in zip(axes.flat, present, strict=True):
        for index, result in enumerate(results):
            found = [(i, layer[name].mean) for i, layer in enumerate(result.layers) if name in layer]
            if not found:
                continue
            layers, values = [i for i, _ in found], [value for _, value in found]
            centre = torch.stack([value.mean() for value in values])
            ax.plot(layers, centre, label=result.label, **line_style(index))
            colour = COLOURS[index % len(COLOURS)]
            if max(map(len, values)) <= MOST_HEADS:
                for layer, heads in zip(layers, values, strict=True):
                    ax.scatter([layer] * len(heads), heads, s=9, color=colour, alpha=0.5, linewidths=0)
            else:
                low, high = (torch.stack([value.quantile(q) for value in values]) for q in (0.1, 0.9))
                ax.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set_title(titles.get(name, name), fontsize=10)
        ax.set_ylabel("value (dimensionless)")
        layer_axis(ax, max(len(result.layers) for result in results))
    shared_legend(figure, results, present)
    return figure


def parameter_pictures(results: Sequence[Result]) -> list[Picture]:
    """The figure, if any model has a remedy."""
    figure = draw_parameters(results)
    return [Picture("parameters.png", TITLE, CAPTION, figure)] if figure else []
