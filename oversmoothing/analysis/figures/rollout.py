"""Figure of the attention rollout."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..results import Result
from .style import BANDS, Drawing, by_layer, panels, shared_legend


def draw_rollout(results: Sequence[Result]) -> Figure:
    """The entropy of the rollout over the patches, and how much the mixtures of different tokens differ."""
    figure, axes = panels(1, 2)
    left, right = axes.flat
    by_layer(left, results, "rollout_entropy", "spread over the patches", "entropy (nats)")
    by_layer(
        right,
        results,
        "rollout_high_frequency_response",
        "how much tokens differ in it",
        "response, ≠ 0 (gain)",
        log=True,
    )
    shared_legend(figure, results)
    return figure


DRAWINGS = (
    Drawing(
        "rollout",
        "Attention rollout",
        "The product of (A + I) / 2 from the first to each layer, heads averaged. Left: entropy over the patches of "
        "the class token's row, or of the mean row; the logarithm of the number of patches when uniform. Right: "
        "towards 0 all tokens are made of the same mixture. With uniform maps it halves in each layer; slower means "
        "that the maps keep tokens apart. The identity stands for the residual branch; MLPs and the size of the "
        f"branches do not enter, so it says what attention allows, not what the features do. {BANDS}",
        ("rollout_entropy", "rollout_high_frequency_response"),
        draw_rollout,
    ),
)
