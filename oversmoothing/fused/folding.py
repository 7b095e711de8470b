"""Folding: what is affine in an attention layer's output costs nothing if its projection does it.

Both remedies scale the attention branch and add one vector an image. ``proj`` is affine too, so the two compose into
one projection with another weight (C x C numbers, made anew in every step: parameters are never rewritten) and, in
place of the bias, an offset of shape (B, 1, C). Backward keeps no further tensor over the tokens.

A layer that can be folded into has ``unprojected(x, ...) -> (heads, weight, offset)``, with
``affine(heads, weight, offset)`` its output before ``proj_drop``. ``set_fused`` turns this and every other fast
path of this package off and on.
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor, nn


def set_fused(model: nn.Module, enabled: bool) -> nn.Module:
    """Switches every fast path of ``model`` off, or on again; the same as building it with ``fused=enabled``.

    Off means the definitions: attention maps as tensors, the remedies as written in the paper, every token through the
    last block. ``torch.func``, second derivatives and timm's ``AttentionExtract`` need that. It sets the attribute
    ``fused_attn``, timm's own switch, so timm's attention layers follow too, and models built after
    ``timm.layers.set_fused_attn(False)`` have it off from the start. timm's Swin makes its maps unless told otherwise:
    there "on" is more than the default, and changes which kernel computes ``A V``.

    Returns:
        ``model`` itself.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = enabled
        if hasattr(module, "folds"):
            module.folds = enabled
    return model


def has_hooks(module: nn.Module) -> bool:
    """Whether any hook is registered on ``module``: then it has to be called, not only read."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def can_fold(attn: nn.Module) -> bool:
    """Whether ``attn.proj`` is nothing but its weight and bias: not wrapped (LoRA), parametrised or hooked."""
    return attn.fused_attn and type(attn.proj) is nn.Linear and not has_hooks(attn.proj)


def affine(x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    """``x weight^T + offset``: (B, N, C_in) -> (B, N, C_out); offset is None, (C_out,) or (B, 1, C_out)."""
    if offset is None or isinstance(offset, nn.Parameter):  # a bias as it is
        return F.linear(x, weight, offset)
    return F.linear(x, weight).add_(offset)  # in place: backward does not need what linear returned


class FoldedAttention(Attention):
    """timm's ``Attention`` in two halves, what comes before the projection and the projection; arguments as timm's."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, num_queries: int | None = None
    ) -> Tensor:
        """(B, N, C) -> (B, N, C), or (B, num_queries, C): what the first ``num_queries`` tokens get, without a mask."""
        heads, v = self.heads(x, attn_mask, is_causal, num_queries)
        if torch.jit.is_scripting():
            return self.proj_drop(self.proj(heads))
        if not can_fold(self):
            return self.proj_drop(self.proj(heads))
        weight, offset = self.projection(v)
        return self.proj_drop(affine(heads, weight, offset))

    def unprojected(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, N, C) -> heads (B, N, attn_dim), weight (C, attn_dim) and offset for ``affine``."""
        heads, v = self.heads(x, attn_mask, is_causal)
        return heads, *self.projection(v)

    def heads(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, num_queries: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The input of the projection, (B, num_queries or N, attn_dim), and the values, (B, num_heads, N, head_dim)."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q[:, :, :num_queries]), self.k_norm(k)
        y = self.attend(q, k, v, attn_mask, is_causal).transpose(1, 2).flatten(2)
        y = self.norm(y)
        if self.gate is not None:
            y = y * self.gate(x[:, :num_queries]).sigmoid()
        return y, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Attention per head: q (B, num_heads, Q, head_dim), k and v over N tokens -> the shape of q."""
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        return self.attn_drop(self.maps(q, k, attn_mask, is_causal)) @ v

    def maps(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """The attention maps, (B, num_heads, Q, N)."""
        attn = q * self.scale @ k.transpose(-2, -1)
        mask = resolve_self_attn_mask(k.shape[-2], attn, attn_mask, is_causal)
        return maybe_add_mask(attn, mask).softmax(dim=-1)  # timm's function, so that fx does not look into the choice

    def projection(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and offset of the projection; a remedy that acts on the heads folds itself in here."""
        return self.proj.weight, self.proj.bias
