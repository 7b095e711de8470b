"""Exclusive self-attention: the output of attention for a token, without the part along the token's own value."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Heads
from .base import AttentionRemedy, Operator, register_remedy


@register_remedy
@dataclass(frozen=True, kw_only=True)
class Exclusive(AttentionRemedy):
    """``y - tanh(alpha) (y . n) n`` with ``n = v / |v|`` of the same token and head; one ``alpha`` per head, from zero.

    The paper's rule is the full projection, ``learnable=False``. No code of its author was found; the learnable form
    and the lower bound of ``|v|``, 1e-4, are those of the modded-nanogpt repository.
    """

    name = "exclusive"
    formula = "y - tanh(alpha) (y . v) v / |v|^2"
    source = "arXiv 2603.09078"
    cost = "a few passes over the values"
    published = dict(learnable=False)
    per_head = ("alpha",)

    alpha: float = 0.0

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """One application."""
        strength = torch.tanh(self.weights(attn, heads.v)[0]) if self.learnable else 1.0

        def wrapped(v: Tensor) -> Tensor:
            y, n = apply(v), F.normalize(v, dim=-1, eps=1e-4)
            return y - strength * (y * n).sum(dim=-1, keepdim=True) * n

        return wrapped
