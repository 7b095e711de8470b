"""Names in figures: a user's text is drawn as it is, in as many lines as fit into its place."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

WIDTH = 0.62  # of a character relative to the font's size, on average; DejaVu Sans
LEAST = 8  # characters in a line
LEGEND = 9  # points


def fold(text: str, inches: float, fontsize: float = 10) -> str:
    """A text in lines that fit into a width, for matplotlib, which would take what stands between two ``$`` for maths.

    Lines break after spaces and the marks that models' names are joined by (``_ - . / :``), within longer parts
    anywhere.

    Args:
        text: As the user gave it.
        inches: The width.
        fontsize: In points.
    """
    most = max(LEAST, int(72 * inches / (WIDTH * fontsize)))
    parts = [part for word in re.findall(r"[^\s_./:-]*[\s_./:-]?", text) for part in re.findall(f".{{1,{most}}}", word)]
    lines = [""]
    for part in parts:
        if len((lines[-1] + part).rstrip()) <= most:
            lines[-1] += part
        else:
            lines.append(part)
    return "\n".join(line.strip() for line in lines).replace("$", r"\$")


def panel_title(ax: Axes, text: str, fontsize: float = 10, inches: float | None = None) -> None:
    """The title of a panel; no wider than its share of the figure's width, or than ``inches``."""
    share = ax.figure.get_figwidth() / ax.get_gridspec().ncols
    ax.set_title(fold(text, inches or 0.92 * share, fontsize), fontsize=fontsize)


def figure_title(figure: Figure, text: str, fontsize: float = 11) -> None:
    """The title of a figure, no wider than the figure."""
    figure.suptitle(fold(text, 0.92 * figure.get_figwidth(), fontsize), fontsize=fontsize)


def legend_below(
    figure: Figure, lines: Sequence[tuple[str, Mapping[str, Any]]], title: str | None = None, most_columns: int = 3
) -> None:
    """A legend below all panels, in as many columns as fit; the figure grows by the rows that it adds.

    Args:
        figure: With the constrained layout.
        lines: Label and line style of each.
        title: Above the legend.
        most_columns: Upper limit.
    """
    width, handle = 0.95 * figure.get_figwidth(), 0.6  # inches; the handle with the gaps around it
    longest = max(len(label) for label, _ in lines) * WIDTH * LEGEND / 72 + handle
    columns = max(1, min(most_columns, len(lines), int(width / longest)))
    labels = [fold(label, width / columns - handle, LEGEND) for label, _ in lines]
    handles = [Line2D([], [], label=label, **style) for label, (_, style) in zip(labels, lines, strict=True)]
    heights = [label.count("\n") + 1 for label in labels]
    rows = -(-len(lines) // columns)
    height = max(sum(heights[start : start + rows]) for start in range(0, len(lines), rows))
    figure.set_figheight(figure.get_figheight() + (height - 1) * 1.35 * LEGEND / 72)
    title = title and fold(title, width, LEGEND)
    below = dict(loc="outside lower center", frameon=False, fontsize=LEGEND, title_fontsize=LEGEND)
    figure.legend(handles, labels, ncols=columns, title=title, **below)
