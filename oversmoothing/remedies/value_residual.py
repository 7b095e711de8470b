"""Value residual (ResFormer): every layer attends to a mixture of its own values and the first layer's."""

from dataclasses import dataclass

from torch import nn

from ..attention import Heads
from .base import AttentionRemedy, Operator, register_remedy


@register_remedy
@dataclass(frozen=True, kw_only=True)
class ValueResidual(AttentionRemedy):
    """``A (a v + b v0)`` in every layer but the first, with ``v0`` the first layer's values, not detached.

    The authors' code fixes both weights at 0.5 (language models). Here they are learnable, one per head, and start at
    (1, 0), which leaves the layer unchanged. ``["neutreno", "value_residual"]`` is the authors' combination of the two:
    the difference ``v0 - v`` is then taken after the mixing.
    """

    name = "value_residual"
    formula = "A (a v + b v0), layers after the first"
    source = "arXiv 2410.17897, ACL 2025"
    cost = "one pass over the values; the first layer's are kept"
    published = dict(a=0.5, b=0.5, learnable=False)
    per_head = ("a", "b")
    needs_first_values = True

    a: float = 1.0
    b: float = 0.0

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """``apply(a v + b v0)``."""
        a, b = self.weights(attn, heads.v)
        return lambda v: apply(a * v + b * heads.first_v)
