"""Norms of tokens: how large they are, which tokens are outliers, and where the outliers lie.

Large vision transformers use a few patches of uniform background as registers: the norms of these patches are several
times those of the others, and attention maps show them as artefacts.
"""

import math

import torch
from torch import Tensor

from ..probe import LayerView
from ..spectrum import as_tokens
from .base import Group

OUTLIER_RATIO = 2.0


def token_norms(tokens: Tensor) -> Tensor:
    """Euclidean norm of every token.

    Args:
        tokens: Features of shape (B, N, C).

    Returns:
        Shape (B, N), in feature units.

    Raises:
        ValueError: If ``tokens`` is not three-dimensional.
    """
    return torch.linalg.vector_norm(as_tokens(tokens), dim=-1)


def outliers(norms: Tensor, ratio: float = OUTLIER_RATIO) -> Tensor:
    """The tokens whose norm is more than ``ratio`` times the median norm of the image's tokens.

    A ratio to the median needs no unit and no threshold per model, and outliers hardly change the median while they are
    fewer than half of the tokens. Tokens of nearly equal norm have no outliers by this rule; a multiple of their spread
    would find some.

    Args:
        norms: Shape (B, N), of patches only: class and register tokens have large norms by design.
        ratio: Larger than 1. The norms of the source's outliers are about ten times those of the other tokens.

    Returns:
        Shape (B, N), boolean.

    Source: Darcet et al., "Vision transformers need registers", arXiv 2309.16588: it finds two modes in the norms and
    separates them by a threshold chosen per model.
    """
    return norms > ratio * _median(norms)[:, None]


def _median(norms: Tensor) -> Tensor:
    return norms.quantile(0.5, dim=-1)  # torch.median takes the lower of two middle values


class Tokens(Group):
    """Norms of the tokens in each block's output, before the model's last norm."""

    name = "tokens"
    about = "norms of the tokens of each block, outliers among the patches and where they lie"
    quantities = {
        "token_norm_median": "median norm of the patch tokens of the block's output (feature units)",
        "token_norm_max": "largest norm of a patch token of the block's output (feature units)",
        "outlier_tokens": f"patch tokens with a norm above {OUTLIER_RATIO:g} times the median (tokens an image)",
        "outlier_positions": "the same for each patch, by row and column (share of the images, 0 to 1)",
        "prefix_norm": "norm of each token in front of the patches: class, distillation, registers (feature units)",
    }
    profiles = frozenset({"outlier_positions", "prefix_norm"})
    image_map = "token norm / median norm of the patches"

    def measure(self, view: LayerView) -> dict[str, Tensor]:
        """Shape (B,) each, except ``outlier_positions`` (B, rows, columns) and ``prefix_norm`` (B, prefix tokens)."""
        norms = token_norms(view.after_mlp)
        num_prefix = self.num_prefix(view)
        if num_prefix is None:
            self.left_out[view.layer.name] = "its tokens are not those of the image's patches"
            return {}
        patches = norms[:, num_prefix:]
        found = outliers(patches)
        statistics = {
            "token_norm_median": _median(patches),
            "token_norm_max": patches.amax(dim=-1),
            "outlier_tokens": found.sum(dim=-1),
        }
        if view.layer.kind.raster:
            statistics["outlier_positions"] = found.unflatten(1, self.grid_of(view))
        else:
            self.left_out[view.layer.name] = "positions: its tokens are not in the order of the image's rows"
        if num_prefix:
            statistics["prefix_norm"] = norms[:, :num_prefix]
        return statistics

    def over_image(self, view: LayerView) -> Tensor | None:
        """Norms over the grid of patches, relative to their median, (rows, columns)."""
        num_prefix = self.num_prefix(view)
        if num_prefix is None or not view.layer.kind.raster:
            return None
        norms = token_norms(view.after_mlp)[:, num_prefix:]
        return (norms / _median(norms)[:, None])[0].reshape(self.grid_of(view))

    def num_prefix(self, view: LayerView) -> int | None:
        """Number of prefix tokens; None if there are fewer tokens than patches, as after pooling."""
        extra = view.after_mlp.shape[1] - math.prod(self.grid_of(view))
        if not view.layer.kind.raster and view.grid is None:
            return 0  # Hiera and NesT: patches only, at the stage's own resolution
        return extra if extra >= 0 else None
