"""Shaped attention: a weighted sum of the identity, the attention map and the uniform map."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import Heads
from .base import AttentionRemedy, Operator, register_remedy, uniform_map


@register_remedy
@dataclass(frozen=True, kw_only=True)
class Shaped(AttentionRemedy):
    """``alpha v + beta y - gamma m``, each weight one per head; ``m`` is the output of attention with all scores zero.

    As a remedy it starts at (0, 1, 0), which leaves the layer unchanged. The published form starts at (1, 1, 1) with
    the query projection at zero, so the map starts as the identity, in blocks without skip connection. The authors use
    causal attention only, where ``m`` is the running mean. AttnScale is the case ``alpha = 0``, ``beta - gamma = 1``.
    """

    name = "shaped"
    formula = "alpha v + beta y - gamma m"
    source = "arXiv 2311.01906, ICLR 2024; before it 2302.10322"
    cost = "one pass over the values"
    published = dict(alpha=1.0, beta=1.0, gamma=1.0)
    per_head = ("alpha", "beta", "gamma")

    alpha: float = 0.0
    beta: float = 1.0
    gamma: float = 0.0

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """One application."""
        alpha, beta, gamma = self.weights(attn, heads.v)

        def wrapped(v: Tensor) -> Tensor:
            if heads.is_causal:
                counts = torch.arange(1, v.shape[-2] + 1, dtype=v.dtype, device=v.device)
                mean = v.cumsum(dim=-2) / counts[:, None]
            else:
                mean = heads.token_mean(v)
            return alpha * v + beta * apply(v) - gamma * mean

        return wrapped

    def maps(self, attn: nn.Module, maps: Tensor, heads: Heads) -> Tensor:
        """``alpha I + beta A - gamma U``."""
        alpha, beta, gamma = self.weights(attn, maps)
        identity = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
        uniform = uniform_map(heads, maps)
        if heads.is_causal:
            uniform = torch.ones_like(identity).tril()
            uniform = uniform / uniform.sum(dim=-1, keepdim=True)
        return alpha * identity + beta * maps - gamma * uniform
