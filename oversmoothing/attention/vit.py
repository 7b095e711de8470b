"""Attention over one sequence or one feature map: vision transformers and models built like them."""

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import beit, convit, davit, fastvit, metaformer, tiny_vit, tnt, visformer, volo
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from ..fused.folding import FoldedAttention
from .heads import Heads
from .kinds import Kind, dropout_of, linear_weights, merge_heads, packed_heads, register_kind, split_heads


@register_kind(metaformer.Attention, volo.Attention)
class PackedKind(Kind):
    """One projection for queries, keys and values, and nothing else; tokens (B, N, C) or (B, H, W, C)."""

    packed = True

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B, ..., C)."""
        return Heads(x, *packed_heads(attn, x), attn.scale, dropout=dropout_of(attn), fused=attn.fused_attn)


@register_kind(davit.WindowAttention)
class DavitWindowKind(PackedKind):
    """DaViT's windows, (B * windows, N, C)."""

    windowed = True
    block_channels_last = False
    stream = "cpe2"

    def branch(self, attn: nn.Module, block: nn.Module) -> None:
        """Windows are merged inside the block's forward."""
        return None


class GatedKind(Kind):
    """The part behind the heads in timm's own layers: an optional inner norm and an optional gate from the input."""

    def unprojected(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """(B, H, N, D) -> (B, N, H * D)."""
        y = attn.norm(merge_heads(y))
        return y if attn.gate is None else y * attn.gate(heads.x).sigmoid()

    def value_weights(self, attn: nn.Module) -> tuple[Tensor, Tensor] | None:
        """None with an inner norm or a gate."""
        return super().value_weights(attn) if isinstance(attn.norm, nn.Identity) and attn.gate is None else None


@register_kind(Attention, FoldedAttention)
class PlainKind(GatedKind):
    """timm's ``Attention``: ViT, DeiT, DeiT3, SigLIP, CLIP, DINOv2, PiT, CrossViT, NaFlexViT; with q/k norms."""

    packed = True

    def split(self, attn: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Heads:
        """x: (B, N, C); attn_mask: broadcastable to (B, H, N, N), added to the scores or boolean."""
        q, k, v = packed_heads(attn, x)
        q, k, mask = attn.q_norm(q), attn.k_norm(k), attn_mask
        return Heads(x, q, k, v, attn.scale, mask, is_causal, dropout_of(attn), attn.fused_attn, attn_mask)


@register_kind(EvaAttention, AttentionRope)
class RotaryKind(GatedKind):
    """EVA, EVA02, DINOv3, PE, rotary NaFlexViT; joint or separate projections, grouped keys and values."""

    def split(
        self,
        attn: EvaAttention | AttentionRope,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Heads:
        """x: (B, N, C); rope: as timm's ``apply_rot_embed_cat`` takes it, for the tokens behind the prefix."""
        if attn.qkv is None:
            kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
            q = split_heads(attn.q_proj(x), attn.num_heads)
            k, v = split_heads(attn.k_proj(x), kv_heads), split_heads(attn.v_proj(x), kv_heads)
        else:
            kv_heads = attn.num_heads
            q, k, v = packed_heads(attn, x)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            q, k = _rotate(attn, q, rope).type_as(v), _rotate(attn, k, rope).type_as(v)
        if kv_heads != attn.num_heads:
            k, v = (part.repeat_interleave(attn.num_heads // kv_heads, dim=1) for part in (k, v))
        return Heads(x, q, k, v, attn.scale, attn_mask, is_causal, dropout_of(attn), attn.fused_attn, attn_mask)

    def value_weights(self, attn: nn.Module) -> tuple[Tensor, Tensor] | None:
        """None also with grouped values, where several heads share weights."""
        if not isinstance(attn.norm, nn.Identity) or attn.gate is not None:
            return None
        separate = attn.qkv is None
        return linear_weights(attn.v_proj if separate else attn.qkv, attn.proj, parts=1 if separate else 3)


def _rotate(attn: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    prefix, patches = x.split([attn.num_prefix_tokens, x.shape[2] - attn.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=2)


@register_kind(beit.Attention)
class BeitKind(Kind):
    """BEiT: a position bias per layer, one shared by all layers, or both."""

    packed = True

    def split(self, attn: nn.Module, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Heads:
        """x: (B, N, C); shared_rel_pos_bias: (1, H, N, N)."""
        bias = shared_rel_pos_bias
        if attn.relative_position_bias_table is not None:
            own = table_bias(attn)
            bias = own if bias is None else own + bias
        return Heads(x, *packed_heads(attn, x), attn.scale, bias, dropout=dropout_of(attn), fused=attn.fused_attn)


def table_bias(attn: nn.Module) -> Tensor:
    """The position bias (1, H, N, N) of a layer that holds it as a table, with an index (N, N) into the table."""
    return attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1).contiguous().unsqueeze(0)


@register_kind(RelPosAttention)
class RelPosKind(Kind):
    """timm's ViT with relative positions: a bias module per layer, or one bias for all layers."""

    packed = True

    def split(self, attn: RelPosAttention, x: Tensor, shared_rel_pos: Tensor | None = None) -> Heads:
        """x: (B, N, C); shared_rel_pos: (1, H, N, N)."""
        q, k, v = packed_heads(attn, x)
        bias = shared_rel_pos if attn.rel_pos is None else attn.rel_pos.get_bias()
        q, k = attn.q_norm(q), attn.k_norm(k)
        return Heads(x, q, k, v, attn.scale, bias, dropout=dropout_of(attn), fused=attn.fused_attn)


@register_kind(tiny_vit.Attention)
class TinyVitKind(Kind):
    """TinyViT's windows: a norm in front, value heads with a width of their own, a bias for each distance."""

    windowed = True

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B * windows, N, C)."""
        packed = split_heads(attn.qkv(attn.norm(x)), attn.num_heads)
        q, k, v = packed.split([attn.key_dim, attn.key_dim, attn.val_dim], dim=-1)
        return Heads(x, q, k, v, attn.scale, attn.get_attention_biases(x.device)[None], fused=attn.fused_attn)

    def branch(self, attn: nn.Module, block: nn.Module) -> None:
        """Windows are merged inside the block's forward."""
        return None


@register_kind(tnt.Attention)
class TntKind(Kind):
    """TNT, inner and outer sequences: one projection for queries and keys, one for values."""

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B, N, C)."""
        q, k = (split_heads(part, attn.num_heads) for part in attn.qk(x).chunk(2, dim=-1))
        return Heads(x, q, k, split_heads(attn.v(x), attn.num_heads), attn.scale, dropout=dropout_of(attn))


@register_kind(convit.MHSA)
class ConvitKind(Kind):
    """ConViT's last layers: plain attention that makes its maps as tensors."""

    packed = True

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B, N, C)."""
        return Heads(x, *packed_heads(attn, x), attn.scale, dropout=dropout_of(attn))


class GatedPositionalHeads(Heads):
    """ConViT's gate between content attention and position attention."""

    def softmax_maps(self) -> Tensor:
        """(B, H, N, N), a mean of two softmax maps."""
        attn, N = self.context, self.x.shape[1]
        indices = attn.rel_indices if attn.rel_indices.shape[1] == N else attn.get_rel_indices(N)
        positions = attn.pos_proj(indices).permute(0, 3, 1, 2).softmax(dim=-1)
        gate = attn.gating_param.sigmoid()[:, None, None]
        maps = (1 - gate) * super().softmax_maps() + gate * positions
        return maps / maps.sum(dim=-1, keepdim=True)


@register_kind(convit.GPSA)
class GatedPositionalKind(Kind):
    """ConViT's gated positional self-attention."""

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B, N, C)."""
        q, k = (split_heads(part, attn.num_heads) for part in attn.qk(x).chunk(2, dim=-1))
        v = split_heads(attn.v(x), attn.num_heads)
        return GatedPositionalHeads(x, q, k, v, attn.scale, dropout=dropout_of(attn), context=attn)

    def value_weights(self, attn: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Values have a projection of their own."""
        return linear_weights(attn.v, attn.proj)


class MapKind(Kind):
    """Base for layers on feature maps (B, C, H, W)."""

    channels_last = False
    block_channels_last = False

    def unprojected(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """(B, H, N, D) -> (B, H * D, height, width)."""
        return y.transpose(-1, -2).reshape(len(y), -1, *heads.x.shape[2:])


@register_kind(visformer.Attention)
class VisformerKind(MapKind):
    """Visformer: 1 x 1 convolutions for projections."""

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B, C, H, W)."""
        packed = attn.qkv(x).flatten(2).unflatten(1, (3, attn.num_heads, -1)).mT.contiguous()
        return Heads(x, *packed.unbind(1), attn.scale, dropout=dropout_of(attn), fused=attn.fused_attn)


@register_kind(fastvit.Attention)
class FastVitKind(Kind):
    """FastViT's last stage: linear projections on a feature map."""

    channels_last = False
    block_channels_last = False

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B, C, H, W)."""
        q, k, v = packed_heads(attn, x.flatten(2).mT)
        return Heads(x, q, k, v, attn.scale, dropout=dropout_of(attn), fused=attn.fused_attn)

    def unprojected(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """(B, H, N, D) -> (B, N, H * D)."""
        return merge_heads(y)

    def merge(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """(B, H, N, D) -> (B, C, height, width)."""
        y = attn.proj_drop(attn.proj(self.unprojected(attn, y, heads)))
        return y.mT.reshape(len(y), -1, *heads.x.shape[2:])
