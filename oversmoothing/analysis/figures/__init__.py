"""The figures of an analysis, in the paper's form where the paper has one."""

from collections.abc import Sequence

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(f"figures need matplotlib ({error}): pip install vit-anti-oversmoothing[analysis]") from error

from ..results import Result
from . import distance, eigenvalues, features, maps, rollout, sinks, tokens
from .differences import difference_pictures
from .parameters import parameter_pictures
from .style import COLOURS, DIVERGING, LAYER_AXIS, SEQUENTIAL, Drawing, Picture, layer_axis, line_style, panels
from .text import figure_title, fold, legend_below, panel_title

__all__ = [
    "COLOURS",
    "DIVERGING",
    "DRAWINGS",
    "LAYER_AXIS",
    "SEQUENTIAL",
    "Drawing",
    "Picture",
    "draw_all",
    "figure_title",
    "fold",
    "layer_axis",
    "legend_below",
    "line_style",
    "panel_title",
    "panels",
]

# Group of quantities (oversmoothing.analysis.quantities) -> its figures, in the order of the report.
DRAWINGS: dict[str, tuple[Drawing, ...]] = {
    "features": features.DRAWINGS,
    "maps": maps.DRAWINGS,
    "tokens": tokens.DRAWINGS,
    "sinks": sinks.DRAWINGS,
    "distance": distance.DRAWINGS,
    "rollout": rollout.DRAWINGS,
    "eigenvalues": eigenvalues.DRAWINGS,
}


def draw_all(results: Sequence[Result]) -> list[Picture]:
    """Every figure of the report that has something to show."""
    first, *rest = ([picture for item in items for picture in item.pictures(results)] for items in DRAWINGS.values())
    rest = [picture for pictures in rest for picture in pictures]
    return [*first, *difference_pictures(results), *parameter_pictures(results), *rest]
