"""Figures of attention sinks."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..results import Result
from .style import BANDS, Drawing, by_head, by_layer, from_zero, panels, shared_legend


def draw_sinks(results: Sequence[Result]) -> Figure:
    """Attention on the first token and on the token that receives most, and the norms of their values."""
    figure, axes = panels(2, 2)
    share, norm = "share of the attention", "value norm / mean"
    by_layer(axes[0, 0], results, "sink_first", "attention on the first token", share)
    by_layer(axes[0, 1], results, "sink_largest", "attention on the token that gets most", share)
    by_layer(axes[1, 0], results, "sink_first_value", "the first token's value", norm)
    by_layer(axes[1, 1], results, "sink_largest_value", "the value of the token that gets most", norm)
    for ax in axes[1]:
        ax.axhline(1, color="0.4", linewidth=0.8)
    for ax in axes.flat:
        from_zero(ax)
    shared_legend(figure, results)
    return figure


def draw_sink_heads(results: Sequence[Result]) -> Figure:
    """The largest share of attention on one token, for every head."""
    return by_head(results, "sink_largest", "attention on the token that gets most (share)")


DRAWINGS = (
    Drawing(
        "sinks",
        "Attention sinks",
        "Top: attention that one token receives, averaged over the queries and heads; uniform attention gives each "
        "of N tokens 1/N. Bottom: the norm of that token's value, relative to the mean over the tokens (the line at "
        "1). Much attention on a token with a short value is a no-op: the head adds little. The first token is the "
        f"class token or a register; models without one have none. {BANDS}",
        ("sink_first", "sink_largest"),
        draw_sinks,
    ),
    Drawing(
        "sink_heads",
        "Attention sinks by layer and head",
        "Attention on the token that receives most of it, mean over queries and images, on one colour scale.",
        ("sink_largest",),
        draw_sink_heads,
    ),
)
