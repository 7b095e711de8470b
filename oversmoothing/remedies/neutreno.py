"""NeuTRENO: pulls the output of each layer towards the first layer's values."""

from dataclasses import dataclass

from torch import nn

from ..attention import Heads
from .base import AttentionRemedy, Operator, register_remedy


@register_remedy
@dataclass(frozen=True, kw_only=True)
class Neutreno(AttentionRemedy):
    """``y + alpha (v0 - v)`` in every layer but the first, with ``v0`` the first layer's values, not detached.

    The authors' ``alpha`` is one fixed number, 0.6 (DeiT-Ti, segmentation) or 0.4 (language). Here it is learnable, one
    per head, and starts at zero, which leaves the layer unchanged; ``alpha=0.6, learnable=False`` is their method.
    """

    name = "neutreno"
    formula = "y + alpha (v0 - v), layers after the first"
    source = "arXiv 2312.00751, NeurIPS 2023"
    cost = "one pass over the values; the first layer's are kept"
    published = dict(alpha=0.6, learnable=False)
    per_head = ("alpha",)
    needs_first_values = True

    alpha: float = 0.0

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """``apply(v) + alpha (v0 - v)``."""
        (alpha,) = self.weights(attn, heads.v)
        return lambda v: apply(v) + alpha * (heads.first_v - v)
