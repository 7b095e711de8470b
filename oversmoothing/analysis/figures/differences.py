"""The figure of paired differences between models, by layer."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..paired import SENTENCES, Differences
from ..results import Result
from .style import Picture, layer_axis, line_style, panels
from .text import legend_below

TITLES = {
    "token_similarity": ("token similarity", "cosine"),
    "hc_dc_mlp": ("‖HC‖ / ‖DC‖", "ratio"),
    "effective_rank": ("effective rank", "directions"),
}


def difference_pictures(results: Sequence[Result]) -> list[Picture]:
    """The figure, if any model was compared with the first one."""
    found = [(index, result.differences) for index, result in enumerate(results) if result.differences is not None]
    names = [name for name in SENTENCES if any(name in differences.quantities for _, differences in found)]
    if not names:
        return []
    baseline = found[0][1].baseline
    caption = (
        f"Each model minus {baseline}, of each block's output: means of the differences image by image, and their 95% "
        "intervals, corrected for the number of layers (Bonferroni). Filled: the interval leaves out 0."
    )
    figure = draw_differences(found, names)
    return [Picture("differences.png", f"Differences to {baseline}, paired by image", caption, figure)]


def draw_differences(found: Sequence[tuple[int, Differences]], names: Sequence[str]) -> Figure:
    """One panel a quantity, one line a model, with the number of its line style."""
    figure, axes = panels(1, len(names), height=3.3)
    for ax, name in zip(axes.flat, names, strict=True):
        for position, (index, differences) in enumerate(found):
            layers = differences.quantities.get(name, {})
            style, shift = line_style(index), 0.12 * (position - (len(found) - 1) / 2)
            dots = dict(color=style["color"], marker=style["marker"], markersize=5)
            places = [layer + shift for layer in layers]
            ax.plot(places, [one.mean for one in layers.values()], **style | {"marker": ""})
            for place, one in zip(places, layers.values(), strict=True):
                ax.plot([place, place], [one.low, one.high], color=style["color"], linewidth=1.4)
                ax.plot(place, one.mean, **dots, markerfacecolor=style["color"] if one.found else "white")
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set_title(TITLES[name][0], fontsize=10)
        ax.set_ylabel(f"difference ({TITLES[name][1]})")
        layer_axis(ax, len(found[0][1].blocks))  # all have as many layers as the first model
    legend_below(figure, [(differences.label, line_style(index)) for index, differences in found])
    return figure
