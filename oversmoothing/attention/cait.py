"""CaiT: talking heads, which mix the maps of a layer before and after the softmax."""

import torch
from timm.layers import use_fused_attn
from timm.models.cait import TalkingHeadAttn
from torch import Tensor

from ..fused.folding import recorded
from ..fused.talking_heads import FusedTalkingHeadAttn, mix_heads, talking_heads
from .heads import Heads
from .kinds import Kind, dropout_of, register_kind


class TalkingHeadsHeads(Heads):
    """``A = W_w softmax(W_l S) + b_w``; if ``fused``, ``talking_heads`` computes it and keeps no map."""

    def apply(self, values: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, H, N, D)."""
        if not self.fused:
            return super().apply(values)
        attn, qkv = self.context
        if values is not self.v:
            qkv = torch.stack((self.q, self.k, values))
        mixings = attn.proj_l.weight, attn.proj_l.bias, attn.proj_w.weight, attn.proj_w.bias
        return talking_heads(qkv, self.scale, *mixings).transpose(1, 2)

    def softmax_maps(self) -> Tensor:
        """(B, H, N, N), between the mixings: rows sum to one."""
        (attn, _), scores = self.context, self.q * self.scale @ self.k.transpose(-2, -1)
        return mix_heads(scores, attn.proj_l.weight, attn.proj_l.bias).softmax(dim=-1)

    def maps(self) -> Tensor:
        """(B, H, N, N), after both mixings."""
        if self._maps is None:
            attn, _ = self.context
            self._maps = mix_heads(self.softmax_maps(), attn.proj_w.weight, attn.proj_w.bias)
        return self._maps


@register_kind(TalkingHeadAttn, FusedTalkingHeadAttn)
class TalkingHeadsKind(Kind):
    """CaiT's patch self-attention; timm's own class makes the maps as tensors, here it is fused like ours."""

    packed = True

    def split(self, attn: TalkingHeadAttn, x: Tensor) -> Heads:
        """x: (B, N, C)."""
        dropout = dropout_of(attn)
        fused = getattr(attn, "fused_attn", use_fused_attn()) and not recorded(x) and dropout == 0
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return TalkingHeadsHeads(x, *qkv.unbind(0), attn.scale, dropout=dropout, fused=fused, context=(attn, qkv))
