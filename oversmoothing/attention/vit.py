"""Vision transformers: one sequence, prefix tokens and patches, and full attention over it."""

from timm.layers import Attention
from torch import Tensor

from .heads import Heads
from .kinds import Kind, merge_heads, register_kind, split_heads


@register_kind(Attention)
class PlainKind(Kind):
    """timm's ``Attention``: ViT, DeiT, DeiT3, SigLIP, CLIP, DINOv2; q/k norms, inner norm and gate where present."""

    def split(self, attn: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Heads:
        q, k, v = (split_heads(part, attn.num_heads) for part in attn.qkv(x).chunk(3, dim=-1))
        return Heads(
            x,
            attn.q_norm(q),
            attn.k_norm(k),
            v,
            attn.scale,
            attn_mask,
            is_causal,
            attn.attn_drop.p if attn.training else 0.0,
            attn.fused_attn,
            attn_mask,
        )

    def merge(self, attn: Attention, y: Tensor, heads: Heads) -> Tensor:
        y = attn.norm(merge_heads(y))
        if attn.gate is not None:
            y = y * attn.gate(heads.x).sigmoid()
        return attn.proj_drop(attn.proj(y))
