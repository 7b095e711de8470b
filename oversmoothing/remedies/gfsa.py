"""GFSA: attention as a graph filter, with a second power of the map."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..attention import Heads
from .base import AttentionRemedy, Operator, register_remedy


@register_remedy
@dataclass(frozen=True, kw_only=True)
class GFSA(AttentionRemedy):
    """``A + beta (A + (K - 1)(A^2 - A))`` in place of ``A``; one ``beta`` per head, from zero.

    ``A^K`` is replaced by its first-order form, so ``K`` is only a factor: no power above the second is formed. The
    authors' vision code fixes the weight of ``A`` at 1 and of ``I`` at 0 (their language code has a fixed weight of
    ``I``, 0 by default). ``K`` is 4 on DeiT and CaiT, 3 on Swin. On CaiT ``A`` is the mixed map, not row-stochastic.
    """

    name = "gfsa"
    formula = "y + beta ((K - 1)(A y - y) + y)"
    source = "arXiv 2312.04234, NeurIPS 2024"
    cost = "a second fused attention"
    published = dict(K=4)
    per_head = ("beta",)

    K: int = 4
    beta: float = 0.0

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """Two applications, in the form with the fewest passes: ``y (1 + beta (2 - K)) + beta (K - 1) A y``."""
        (beta,) = self.weights(attn, heads.v)
        own, again = 1 + beta * (2 - self.K), beta * (self.K - 1)

        def wrapped(v: Tensor) -> Tensor:
            y = apply(v)
            return own * y + again * apply(y)

        return wrapped

    def maps(self, attn: nn.Module, maps: Tensor, heads: Heads) -> Tensor:
        """The filter as published; attention dropout falls on all of it."""
        (beta,) = self.weights(attn, maps)
        return maps + beta * (maps + (self.K - 1) * (maps @ maps - maps))
