"""The paper's quantities of features: high-pass to DC, similarity, rank, the spectrum over the image grid."""

import math

from torch import Tensor

from .. import probe, spectrum
from .base import Group


class Features(Group):
    """The quantities that :func:`probe.feature_statistics` computes from the tokens of each block."""

    name = "features"
    about = "the tokens of each block: HC/DC, similarity, rank, 2-D spectrum"
    quantities = {
        "hc_dc_attention": "||HC|| / ||DC|| of what the attention branch adds to the residual stream",
        "hc_dc_residual": "||HC|| / ||DC|| of the residual stream after the attention branch",
        "hc_dc_mlp": "||HC|| / ||DC|| of the block's output, after the MLP branch",
        "dc_energy": "||DC||^2 of the block's output (squared feature units)",
        "hc_energy": "||HC||^2 of the block's output (squared feature units)",
        "token_similarity": "signed cosine similarity of distinct tokens of the block's output",
        "token_similarity_published": "mean |cosine| over all pairs of tokens, diagonal included: the authors' form",
        "effective_rank": "effective rank of the block's output (directions)",
        "singular_values": "singular values of the block's output, descending, relative to the largest",
        "delta_log_amplitude": (
            "log amplitude of the 2-D spectrum of the patch tokens, relative to zero frequency (nats)"
        ),
    }

    profiles = frozenset({"singular_values"})

    def measure(self, view: probe.LayerView) -> dict[str, Tensor]:
        """Shape (B,) each, except the singular values and the log amplitude."""
        num_patches = math.prod(self.grid)
        statistics = probe.feature_statistics(view, num_patches, self.patches_only)
        if "delta_log_amplitude" in statistics:
            grid = round(view.patch_tokens(num_patches).shape[1] ** 0.5)
            self.frequencies[view.index, "delta_log_amplitude"] = spectrum.patch_frequencies(grid).tolist()
        return statistics
