"""Figures of the value-output products' eigenvalues."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..results import Result
from .style import COLOURS, Drawing, by_layer, from_zero, layer_panels, panels, shared_legend
from .text import figure_title


def draw_planes(result: Result) -> Figure:
    """The complex plane, one panel per layer: the eigenvalues of every head and of the sum over heads."""
    figure, axes = layer_panels(result, width=2.3, height=2.2, sharex=True, sharey=True)
    for ax, layer in zip(axes, result.layers, strict=True):
        ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        ax.axvline(0, color="0.6", linewidth=0.6, zorder=0)
        if "vo_real" not in layer:
            ax.text(0.5, 0.5, "left out", transform=ax.transAxes, ha="center", color="0.4")
            continue
        ax.scatter(layer["vo_sum_real"].mean, layer["vo_sum_imag"].mean, s=7, color=COLOURS[1], linewidths=0)
        ax.scatter(layer["vo_real"].mean, layer["vo_imag"].mean, s=5, color=COLOURS[0], linewidths=0)
    # Empty points, so that the legend is complete even if the first layer is left out.
    for colour, label in ((COLOURS[1], "sum over the heads"), (COLOURS[0], "each head")):
        axes[0].scatter([], [], s=20, color=colour, linewidths=0, label=label)
    reach = 1.1 * max(abs(limit) for limit in (*axes[0].get_xlim(), *axes[0].get_ylim()))
    axes[0].set(xlim=(-reach, reach), ylim=(-reach, reach))
    for ax in axes:
        ax.set_aspect("equal")
    figure.supxlabel("real part\n", fontsize=10)  # with a line for the legend
    figure.supylabel("imaginary part", fontsize=10)
    figure_title(figure, result.label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9, borderpad=0)
    return figure


def draw_summary(results: Sequence[Result]) -> Figure:
    """Largest modulus and share with a negative real part, of the heads and of their sum."""
    figure, axes = panels(2, 2)
    by_layer(axes[0, 0], results, "vo_radius", "heads: largest |eigenvalue|", "modulus (mean of heads)")
    by_layer(axes[0, 1], results, "vo_negative", "heads: with a negative real part", "share (mean of heads)")
    by_layer(axes[1, 0], results, "vo_sum_radius", "sum over heads: largest |eigenvalue|", "modulus")
    by_layer(axes[1, 1], results, "vo_sum_negative", "sum over heads: with a negative real part", "share")
    for ax in axes[:, 1]:
        ax.axhline(0.5, color="0.4", linewidth=0.8)
        ax.set_ylim(0, 1)
    for ax in axes[:, 0]:
        from_zero(ax)
    shared_legend(figure, results)
    return figure


DRAWINGS = (
    Drawing(
        "eigenvalue_summary",
        "Eigenvalues of W_V W_O by layer",
        "Of weights alone, no images. Positive real parts amplify the DC part of the tokens most, negative ones can "
        "damp it: with random weights half of them are negative (the line). Norms and LayerScale are not in the "
        "product.",
        ("vo_radius",),
        draw_summary,
    ),
    Drawing(
        "eigenvalues",
        "Eigenvalues of W_V W_O",
        "Each point is an eigenvalue in the complex plane, one panel a layer, the same axes in all.",
        ("vo_real",),
        draw_planes,
        per_model=True,
    ),
)
