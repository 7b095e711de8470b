"""Figures of the attention maps: spectral response, entropy, heads."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..results import Result
from .style import BANDS, COLOURS, Drawing, by_head, by_layer, layer_panels, panels, shared_legend
from .text import figure_title


def draw_attention(results: Sequence[Result]) -> Figure:
    """Attention maps by depth in single numbers: high-frequency response, DC gain, entropy; and the features' rank."""
    figure, axes = panels(2, 2)
    gain = "gain (mean of heads)"
    by_layer(axes[0, 0], results, "high_frequency_response", "response over frequencies ≠ 0", gain, log=True)
    by_layer(axes[0, 1], results, "dc_gain", "response from DC to DC", gain)
    by_layer(axes[1, 0], results, "attention_entropy", "entropy of the softmax rows", "nats (mean of heads)")
    by_layer(axes[1, 1], results, "effective_rank", "effective rank of the features", "directions")
    axes[0, 1].ticklabel_format(useOffset=False)
    low, high = axes[0, 1].get_ylim()
    if high - low < 0.02:  # rows sum to one: do not magnify rounding errors
        axes[0, 1].set_ylim(0.9, 1.1)
    shared_legend(figure, results)
    return figure


def draw_heads(results: Sequence[Result]) -> Figure:
    """The high-frequency response of every head, as a map over layers and heads."""
    return by_head(results, "high_frequency_response", "mean response over frequencies ≠ 0 (gain)", log=True)


def draw_spectra(result: Result) -> Figure:
    """The spectral response of every layer of a model, one panel per layer, one line per head."""
    figure, axes = layer_panels(result, sharex=True, sharey=True)
    for index, ax in enumerate(axes):
        heads, bins = result.layers[index]["spectrum"].mean, result.layers[index]["spectrum"].frequencies
        for head, response in enumerate(heads):
            ax.plot(bins, response, color=COLOURS[5], linewidth=0.7, alpha=0.8, label="one head" if head == 0 else None)
        ax.plot(bins, heads.mean(dim=0), color=COLOURS[1], linewidth=1.4, label="mean of the heads")
        ax.set_yscale("log")
        ax.set_xticks([-1, 0, 1], ["-π", "0", "π"])
        ax.grid(alpha=0.3)
    figure.supxlabel("frequency along the token axis (rad per token)\n", fontsize=10)  # a line for the legend
    figure.supylabel("spectral response (gain)", fontsize=10)
    figure_title(figure, result.label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9, borderpad=0)
    return figure


DRAWINGS = (
    Drawing(
        "attention",
        "Attention and rank by depth",
        "The DC gain is 1 wherever the rows of a map sum to one; CaiT mixes heads after the softmax, so its need not. "
        f"The entropy is that of the softmax itself and at most the logarithm of the number of tokens. {BANDS}",
        ("high_frequency_response", "dc_gain", "attention_entropy"),
        draw_attention,
    ),
    Drawing(
        "heads",
        "High-frequency response by layer and head",
        "Mean of the spectral response over all frequencies but zero, for each head, on one colour scale.",
        ("high_frequency_response",),
        draw_heads,
    ),
    Drawing(
        "spectrum",
        "Spectral response",
        "One panel a layer, logarithmic. The peak at zero frequency is DC; a low-pass map is low everywhere else. Each "
        "response is the mean over the images.",
        ("spectrum",),
        draw_spectra,
        per_model=True,
    ),
)
