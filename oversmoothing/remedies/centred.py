"""Centred attention: the mean token is subtracted from the output of attention."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..attention import Heads
from .base import AttentionRemedy, Operator, register_remedy, uniform_map


@register_remedy
@dataclass(frozen=True, kw_only=True)
class Centred(AttentionRemedy):
    """``y - gamma m`` with ``m`` the mean of the values: the map ``A - gamma 1 1^T / N``, one ``gamma`` per head.

    The paper subtracts the whole mean, ``gamma=1, learnable=False``. Here ``gamma`` is learnable and starts at zero.
    """

    name = "centred"
    formula = "y - gamma m"
    source = "arXiv 2306.01610"
    cost = "one pass over the values"
    published = dict(gamma=1.0, learnable=False)
    per_head = ("gamma",)
    square = False

    gamma: float = 0.0

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """``apply(v) - gamma m``."""
        (gamma,) = self.weights(attn, heads.v)
        return lambda v: apply(v) - gamma * heads.token_mean(v)

    def maps(self, attn: nn.Module, maps: Tensor, heads: Heads) -> Tensor:
        """``A - gamma / N``."""
        (gamma,) = self.weights(attn, maps)
        return maps - gamma * uniform_map(heads, maps)
