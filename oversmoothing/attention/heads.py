"""``Heads``: one attention layer between its projections, the common ground of every family.

Everything before the softmax (joint or separate projections, q/k norms, rotary embeddings, position biases, windows)
ends in queries, keys, values and a bias. Everything after the heads (inner norm, gate, projection) starts from
``A @ values``. ``Heads`` is the part between, for any values: remedies act on it and the analysis reads it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class Heads:
    """Queries, keys and values of one forward pass of one layer, and its attention as an operator on values.

    B counts images, or windows where attention is windowed; H heads, N key tokens, Q query tokens (Q = N unless queries
    are pooled), D channels of a head. ``q`` and ``k`` are taken after norms and rotary embeddings; grouped keys and
    values are expanded to H heads.

    Attributes:
        x: The input of the layer's forward.
        q: (B, H, Q, D).
        k: (B, H, N, D).
        v: (B, H, N, D).
        scale: Factor of the scores ``q k^T``.
        bias: Added to the scores, or boolean with False where attention is forbidden; broadcastable to (B, H, Q, N).
        is_causal: Query i sees keys 0 to i only; then there is no bias.
        dropout: Probability of dropout on the maps in this pass: 0 outside training.
        fused: Whether the layer calls ``scaled_dot_product_attention``; otherwise it makes the maps as tensors.
        attn_mask: The mask that the layer was called with, or None; it tells padded tokens.
        context: Whatever else the kind needs after ``split``.
        first_v: Values of the model's first layer in this pass, for remedies that use them.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    is_causal: bool = False
    dropout: float = 0.0
    fused: bool = False
    attn_mask: Tensor | None = None
    context: Any = None
    first_v: Tensor | None = None
    _maps: Tensor | None = field(default=None, init=False, repr=False)
    _dropped: Tensor | None = field(default=None, init=False, repr=False)

    def apply(self, values: Tensor) -> Tensor:
        """``A @ values`` as the layer computes it, with its dropout on A while training.

        Without fused attention, the maps and their dropout mask are made once and shared by all calls; with fused
        attention each call draws its own dropout.

        Args:
            values: (B, H, N, any), usually ``v``.

        Returns:
            (B, H, Q, any).
        """
        if self.fused:
            scale = None if self.scale == self.q.shape[-1] ** -0.5 else self.scale
            return F.scaled_dot_product_attention(
                self.q, self.k, values, self.bias, self.dropout, self.is_causal, scale=scale
            )
        if self._dropped is None:
            self._dropped = self.drop(self.maps())
        return self._dropped @ values

    def maps(self) -> Tensor:
        """``A`` (B, H, Q, N), the maps that multiply the values, without dropout. On CaiT the mixed softmax maps."""
        if self._maps is None:
            self._maps = self.softmax_maps()
        return self._maps

    def softmax_maps(self) -> Tensor:
        """(B, H, Q, N), rows sum to one; with a boolean mask, a row that sees no key is NaN."""
        scores = self.q * self.scale @ self.k.transpose(-2, -1)
        return (scores if (bias := self._additive_bias(scores)) is None else scores + bias).softmax(dim=-1)

    def drop(self, maps: Tensor) -> Tensor:
        """The layer's dropout on maps; the identity outside training."""
        return F.dropout(maps, self.dropout) if self.dropout > 0 else maps

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean over the key tokens that are not padding: tokens that no query may attend to are left out.

        Args:
            values: (B, H, N, D), or (B, 1, N, C) for features without heads.

        Returns:
            (B, H, 1, D).
        """
        if self.attn_mask is None:
            return values.mean(dim=-2, keepdim=True)
        counts = counted_tokens(self.attn_mask).unsqueeze(-1).to(values.dtype)
        return (values * counts).sum(dim=-2, keepdim=True) / counts.sum(dim=-2, keepdim=True).clamp(min=1)

    def _additive_bias(self, scores: Tensor) -> Tensor | None:
        if self.is_causal:
            return torch.full_like(scores[0, 0], float("-inf")).triu(1)
        if self.bias is None or self.bias.dtype != torch.bool:
            return self.bias
        return torch.zeros_like(self.bias, dtype=scores.dtype).masked_fill(~self.bias, float("-inf"))


def counted_tokens(attn_mask: Tensor) -> Tensor:
    """The key tokens that any query may attend to in any head; the others are padding.

    Args:
        attn_mask: (..., H or 1, Q or 1, N) or (Q, N), boolean with False where attention is forbidden, or added to the
            scores.

    Returns:
        (..., 1, N) or (N,), boolean.
    """
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min / 2
    seen = seen.any(dim=-2)
    return seen if seen.dim() == 1 else seen.any(dim=-2, keepdim=True)
