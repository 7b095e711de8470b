"""Twicing attention: attention once more to the residual that it left."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..attention import Heads
from .base import AttentionRemedy, Operator, register_remedy


@register_remedy
@dataclass(frozen=True, kw_only=True)
class Twicing(AttentionRemedy):
    """``y + gamma (y - A y)``; with ``gamma = 1`` the map ``2 A - A^2``.

    The authors have no parameter, ``gamma = 1`` in all layers (language: in the last ones only), which is no identity
    at the start. Here ``gamma`` is learnable, one a head, from zero; ``gamma=1, learnable=False`` is theirs. One
    dropout mask on the softmax serves both products.
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
