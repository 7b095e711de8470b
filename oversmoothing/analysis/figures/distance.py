"""Figures of the attention distance."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..results import Result
from .style import COLOURS, Drawing, by_head, from_zero, layer_axis, panels
from .text import panel_title


def draw_distance(results: Sequence[Result]) -> Figure:
    """Every head as a point, and the mean of the heads, one panel per model."""
    results = [result for result in results if any("attention_distance" in layer for layer in result.layers)]
    figure, axes = panels(1, len(results), width=4.2, height=3.4, sharey=True)
    for ax, result in zip(axes.flat, results, strict=True):
        layers, mean, _ = result.scalars("attention_distance")
        for layer in layers:
            heads = result.layers[layer]["attention_distance"].mean
            ax.scatter(
                [layer] * len(heads), heads, s=14, color=COLOURS[5], label="one head" if layer == layers[0] else None
            )
        ax.plot(layers, mean, color=COLOURS[1], linewidth=1.5, label="mean of the heads")
        panel_title(ax, f"{result.label}, images of {result.input_size} px")
        ax.set_ylabel("mean attention distance (pixels)")
        ax.tick_params(labelleft=True)
        layer_axis(ax, len(result.layers))
    from_zero(axes.flat[0])  # for all panels: they share the axis
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_distance_heads(results: Sequence[Result]) -> Figure:
    """The attention distance of every head."""
    return by_head(results, "attention_distance", "mean attention distance (pixels)")


DRAWINGS = (
    Drawing(
        "distance",
        "Attention distance",
        "Mean distance between a patch and the patches that it attends to, over all patches and images. In early "
        "layers of trained models some heads look near and others far. Attention within Swin's windows cannot look "
        "further than the window.",
        ("attention_distance",),
        draw_distance,
    ),
    Drawing(
        "distance_heads",
        "Attention distance by layer and head",
        "The same for each head, on one colour scale.",
        ("attention_distance",),
        draw_distance_heads,
    ),
)
