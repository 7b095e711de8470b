"""Attention sinks: tokens that receive much of the attention, often with a value of almost zero norm."""

import torch
from torch import Tensor

from ..probe import LayerView
from ..spectrum import as_maps
from .base import Group


def received_mass(attn: Tensor) -> Tensor:
    """Mean over the queries of the attention that each key receives.

    Args:
        attn: Softmax maps of shape (..., N, N); rows sum to one.

    Returns:
        Shape (..., N), dimensionless, 0 to 1, sums to one over the keys: 1 / N each under uniform attention.

    Raises:
        ValueError: If the maps are not square.

    Source: Xiao et al., "Efficient streaming language models with attention sinks", arXiv 2309.17453.
    """
    return as_maps(attn).mean(dim=-2)


def relative_value_norm(values: Tensor) -> Tensor:
    """Norm of each token's value vector, relative to the mean over the tokens.

    A token with much attention and a value near zero changes nothing: attention to it is a no-op.

    Args:
        values: Shape (..., N, D).

    Returns:
        Shape (..., N), dimensionless; mean 1 over the tokens.

    Source: Sun et al., "Massive activations in large language models", arXiv 2402.17762: massive activations attract
    attention, and their values act as biases.
    """
    norms = torch.linalg.vector_norm(values, dim=-1)
    return norms / norms.mean(dim=-1, keepdim=True)


class Sinks(Group):
    """Sinks of the softmax itself, before AttnScale and other remedies, with the layer's own values."""

    name = "sinks"
    about = "attention on the first token and on the one that gets most, and how long their values are"
    quantities = {
        "sink_first": "attention on the first token, mean over the queries (share, 0 to 1)",
        "sink_first_value": "norm of the first token's value, relative to the mean over the tokens",
        "sink_largest": "attention on the token that receives most of it, mean over the queries (share, 0 to 1)",
        "sink_largest_value": "norm of that token's value, relative to the mean over the tokens",
    }

    def measure(self, view: LayerView) -> dict[str, Tensor]:
        """Shape (B, num_heads) each (in windows B counts them); the first token is left out if it is a patch."""
        mass = received_mass(view.attention_maps().softmax)
        values = relative_value_norm(view.heads().v)
        largest, position = mass.max(dim=-1)
        statistics = {"sink_largest": largest, "sink_largest_value": values.gather(-1, position[..., None]).squeeze(-1)}
        layout = self.patch_layout(view)
        if layout is not None and layout.prefix > 0:
            statistics |= {"sink_first": mass[..., 0], "sink_first_value": values[..., 0]}
        else:
            self.left_out[view.layer.name] = "the first token: it is no class token or register"
        return statistics
