"""Swin's window attention in two halves, so that a remedy can be folded into its projection (see ``folding``)."""

import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from .folding import Foldable, Gains, folded, has_hooks


class FoldedWindowAttention(WindowAttention):
    """timm's ``WindowAttention`` in two halves, the part before the projection and the projection.

    In timm's Swin ``fused_attn`` is off by default: the maps of windows are small tensors. Folding does not depend on
    it and has a switch of its own, ``folds``; ``set_fused`` sets both.
    """

    folds = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B * windows, N, C) -> the same shape; ``mask`` is (windows, N, N), added to the scores."""
        fold = folded(self)
        if fold is None:
            return self.proj_drop(self.proj(self.heads(x, mask)[0]))
        return self.proj_drop(fold.project(*self.unprojected(x, mask)))

    def unprojected(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The arguments of ``Fold.project``: heads (B * windows, N, H * D), and means. For foldable layers only."""
        heads, v = self.heads(x, mask, folded=True)
        return heads, self.means(v)

    def foldable(self) -> Foldable | None:
        """The projection, if it is a bare linear and no dropout falls on the maps; else None."""
        plain = type(self.proj) is nn.Linear and not has_hooks(self.proj)
        if not (self.folds and plain) or (self.training and self.attn_drop.p > 0):
            return None
        return Foldable(Gains, (), self.proj.weight, self.proj.bias)

    def means(self, v: Tensor) -> Tensor | None:
        """The vectors that ``Fold.of_means`` acts on, from the values (B * windows, H, N, D)."""
        return None

    def heads(self, x: Tensor, mask: Tensor | None = None, folded: bool = False) -> tuple[Tensor, Tensor]:
        """The input of the projection, (B * windows, N, H * D), and the values, (B * windows, H, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v, mask, folded).transpose(1, 2).flatten(2), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, folded: bool) -> Tensor:
        """Attention per head, (B * windows, H, N, D) -> the same shape; see ``FoldedAttention.attend``."""
        if not self.fused_attn:
            return self.attn_drop(self.maps(q, k, mask)) @ v
        bias = self.bias(mask)
        if mask is not None:
            bias = bias.repeat(q.shape[0] // len(mask), 1, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, bias, self.attn_drop.p if self.training else 0.0)

    def maps(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The attention maps, (B * windows, H, N, N)."""
        scores, bias = q * self.scale @ k.transpose(-2, -1), self.bias(mask)
        scores = scores.unflatten(0, (-1, len(bias)))
        # In place where autocast does not keep the bias in a higher precision: backward does not need the product.
        scores = scores.add_(bias) if scores.dtype == bias.dtype else scores + bias
        return scores.flatten(0, 1).softmax(dim=-1)

    def bias(self, mask: Tensor | None) -> Tensor:
        """What is added to the scores, (1 or windows, H, N, N)."""
        bias = self._get_rel_pos_bias()
        return bias if mask is None else bias + mask[:, None]
