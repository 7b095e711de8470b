"""Twicing attention: attention is applied again to the residual between the values and its output."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..attention import Heads
from .base import AttentionRemedy, Operator, register_remedy


@register_remedy
@dataclass(frozen=True, kw_only=True)
class Twicing(AttentionRemedy):
    """``y + gamma (y - A y)``; with ``gamma = 1`` the map ``2 A - A^2``.

    The authors have no parameter: ``gamma = 1`` in all layers (language: in the last ones only), so the start is not
    the identity. Here ``gamma`` is learnable, one per head, from zero; ``gamma=1, learnable=False`` is their method.
    Both products use the same dropout mask on the softmax.
    """

    name = "twicing"
    formula = "y + gamma (y - A y)"
    source = "arXiv 2503.00687, ICLR 2025"
    cost = "a second fused attention"
    published = dict(gamma=1.0, learnable=False)
    per_head = ("gamma",)
    drops_softmax = True

    gamma: float = 0.0

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """Two applications."""
        (gamma,) = self.weights(attn, heads.v)

        def wrapped(v: Tensor) -> Tensor:
            y = apply(v)
            return (1 + gamma) * y - gamma * apply(y)

        return wrapped

    def maps(self, attn: nn.Module, maps: Tensor, heads: Heads) -> Tensor:
        """``A + gamma (A - A^2)``."""
        (gamma,) = self.weights(attn, maps)
        return maps + gamma * (maps - maps @ maps)
