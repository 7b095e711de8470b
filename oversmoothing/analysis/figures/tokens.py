"""Figures of the tokens' norms: by layer, and where the outliers lie."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..results import Result
from .style import BANDS, Drawing, by_layer, logarithmic, panels, patch_panels, shared_legend


def draw_norms(results: Sequence[Result]) -> Figure:
    """Median and largest norm, number of outliers, and the norms of the tokens in front of the patches."""
    figure, axes = panels(2, 2)
    norm = "norm (feature units)"
    by_layer(axes[0, 0], results, "token_norm_median", "patches: median norm", norm, log=True)
    by_layer(axes[0, 1], results, "token_norm_max", "patches: largest norm", norm, log=True)
    by_layer(axes[1, 0], results, "outlier_tokens", "patches above twice the median", "tokens an image")
    by_layer(axes[1, 1], results, "prefix_norm", "class token and registers: mean norm", norm, log=True)
    limits = [limit for ax in axes[0] for limit in ax.get_ylim()]
    for ax in axes[0]:  # one scale, so that the two panels can be compared
        ax.set_ylim(min(limits), max(limits))
        logarithmic(ax)
    if not any(layer["outlier_tokens"].mean for r in results for layer in r.layers if "outlier_tokens" in layer):
        axes[1, 0].set_ylim(-0.05, 1)  # no outliers: put the line of zeros at the bottom of the panel
    else:
        axes[1, 0].set_ylim(bottom=0)
    shared_legend(figure, results)
    return figure


def draw_positions(result: Result) -> Figure | None:
    """Where the outliers lie, one panel per layer; None if no image has any."""
    found = {
        index: layer["outlier_positions"].mean
        for index, layer in enumerate(result.layers)
        if "outlier_positions" in layer
    }
    if not any(share.any() for share in found.values()):
        return None
    return patch_panels(result, found, "share of the images")


DRAWINGS = (
    Drawing(
        "token_norms",
        "Norms of the tokens",
        "Of each block's output. Outliers are patches with a norm above twice the median of their image: a few "
        f"tokens that large models use as registers of their own, and that attention maps show as artefacts. {BANDS}",
        ("token_norm_median", "token_norm_max", "outlier_tokens"),
        draw_norms,
    ),
    Drawing(
        "outlier_positions",
        "Where outliers lie",
        "Share of the images in which the patch at a position is an outlier, one panel a layer, on one colour scale.",
        ("outlier_positions",),
        draw_positions,
        per_model=True,
    ),
)
