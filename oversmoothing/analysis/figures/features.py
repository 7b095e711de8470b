"""Figures of the features: high-pass against DC, similarity, the spectrum over the image grid."""

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..results import Result
from .style import BANDS, LAYER_AXIS, SEQUENTIAL, Drawing, by_layer, panels, shared_legend, up_to_one
from .text import panel_title


def draw_overview(results: Sequence[Result]) -> Figure:
    """The two main curves of over-smoothing: similarity of the tokens and HC/DC, of each block's output."""
    figure, axes = panels(1, 2, width=4.5, height=3.4)
    left, right = axes.flat
    by_layer(left, results, "token_similarity", "how alike the tokens are", "cosine similarity of distinct tokens")
    up_to_one(left)
    by_layer(right, results, "hc_dc_mlp", "how much the tokens differ from their mean", "‖HC‖ / ‖DC‖", log=True)
    shared_legend(figure, results, title="block outputs; lines: mean over the images, bands: one standard deviation")
    return figure


def draw_ratios(results: Sequence[Result]) -> Figure:
    """HC/DC after the attention branch, after the residual sum and after the MLP."""
    figure, axes = panels(1, 3, sharey=True)
    titles = {
        "hc_dc_attention": "after attention (branch)",
        "hc_dc_residual": "after the residual sum",
        "hc_dc_mlp": "after the MLP (block output)",
    }
    for ax, (quantity, title) in zip(axes.flat, titles.items(), strict=True):
        by_layer(ax, results, quantity, title, "‖HC‖ / ‖DC‖", log=True)
        ax.tick_params(labelleft=True)
    shared_legend(figure, results)
    return figure


def draw_similarity(results: Sequence[Result]) -> Figure:
    """Similarity of tokens and of attention maps by depth."""
    figure, axes = panels(2, 2)
    titles = {
        "token_similarity": "tokens: signed, distinct pairs",
        "token_similarity_published": "tokens: |cos|, all pairs (authors' form)",
        "head_similarity": "maps: heads of a layer",
        "layer_similarity": "maps: a layer and the one before",
    }
    for ax, (quantity, title) in zip(axes.flat, titles.items(), strict=True):
        if by_layer(ax, results, quantity, title, "cosine similarity") and quantity.startswith("token"):
            up_to_one(ax)  # similarities of maps are all near 1, so their panels show the range of the data
    shared_legend(figure, results)
    return figure


def draw_singular_values(results: Sequence[Result]) -> Figure:
    """Singular values of the token matrix, largest first, one panel per model, one line per layer."""
    results = [result for result in results if any("singular_values" in layer for layer in result.layers)]
    figure, axes = panels(1, len(results), width=4.4, height=3.4, sharey=True)
    deepest = max(len(result.layers) for result in results) - 1
    colours = colormaps[SEQUENTIAL]
    smallest = 1.0
    for ax, result in zip(axes.flat, results, strict=True):
        for index, layer in enumerate(result.layers):
            if "singular_values" in layer:
                values = layer["singular_values"].mean
                ax.plot(range(1, len(values) + 1), values, color=colours(index / max(deepest, 1)), linewidth=1.2)
                shown = values[: max(1, round(0.9 * len(values)))]  # the smallest ones may be rounding errors
                smallest = min(smallest, shown[shown > 0].min().item())
        panel_title(ax, result.label)
        ax.set_xlabel("index of the singular value")
        ax.set_ylabel("relative to the largest")
        ax.set_yscale("log")
        ax.tick_params(labelleft=True)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylim(max(smallest / 2, 1e-7), 1.3)
    scale = ScalarMappable(Normalize(0, max(deepest, 1)), SEQUENTIAL)
    figure.colorbar(scale, ax=axes, label=LAYER_AXIS, ticks=MaxNLocator(integer=True))
    return figure


def draw_log_amplitude(results: Sequence[Result]) -> Figure:
    """Relative log amplitude of the patch tokens' 2-D spectrum, one panel per model, one line per layer."""
    drawable = [result for result in results if any("delta_log_amplitude" in layer for layer in result.layers)]
    figure, axes = panels(1, len(drawable), width=3.6, sharey=True)
    deepest = max(len(result.layers) for result in drawable) - 1
    colours = colormaps[SEQUENTIAL]
    for ax, result in zip(axes.flat, drawable, strict=True):
        for index, layer in enumerate(result.layers):
            if "delta_log_amplitude" in layer:
                values = layer["delta_log_amplitude"]
                ax.plot(values.frequencies, values.mean, color=colours(index / max(deepest, 1)), linewidth=1.2)
        panel_title(ax, result.label)
        ax.set_xlabel("frequency (π rad per patch)")
        ax.set_ylabel("Δ log amplitude (nats)")
        ax.tick_params(labelleft=True)
        ax.grid(alpha=0.3)
    scale = ScalarMappable(Normalize(0, max(deepest, 1)), SEQUENTIAL)
    figure.colorbar(scale, ax=axes, label=LAYER_AXIS, ticks=MaxNLocator(integer=True))
    return figure


DRAWINGS = (
    Drawing(
        "overview",
        "Over-smoothing at a glance",
        f"Of each block's output. Left: towards 1 all tokens are alike. Right: towards 0 they become one. {BANDS}",
        ("token_similarity", "hc_dc_mlp"),
        draw_overview,
    ),
    Drawing(
        "hc_dc",
        "High-frequency against DC",
        "‖HC‖/‖DC‖ of the token sequence, logarithmic. Towards 0 the tokens become one. The first panel shows what the "
        f"attention branch adds, after FeatScale and LayerScale where the model has them. {BANDS}",
        ("hc_dc_attention", "hc_dc_residual", "hc_dc_mlp"),
        draw_ratios,
    ),
    Drawing(
        "similarity",
        "Similarity by depth",
        "Towards 1 the tokens, or maps, are alike. The authors' form drops the sign and counts each token with itself, "
        "so it cannot come near 0. Softmax maps are non-negative, so their similarity is high anyway; CaiT's mixed "
        f"maps are signed. {BANDS}",
        ("token_similarity", "token_similarity_published", "head_similarity", "layer_similarity"),
        draw_similarity,
    ),
    Drawing(
        "singular_values",
        "Singular values of the tokens",
        "Of each block's token matrix, largest first, divided by the largest; means over the images. The faster a "
        "curve falls, the fewer directions hold the tokens; where all tokens are one, only the first value is left.",
        ("singular_values",),
        draw_singular_values,
    ),
    Drawing(
        "log_amplitude",
        "Fourier spectrum of the patch tokens",
        "Log amplitude on the diagonal of the 2-D spectrum over the image grid, minus that at zero frequency, averaged "
        "over channels and images. Lower at the right: smoother over the picture.",
        ("delta_log_amplitude",),
        draw_log_amplitude,
    ),
)
