"""Attention inside windows, and the hierarchical models that pool their queries or keys."""

import math

import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models import (
    gcvit,
    hiera,
    hieradet_sam2,
    maxxvit,
    nest,
    pvt_v2,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    twins,
    vision_transformer_sam,
)
from torch import Tensor, nn

from ..fused.windows import FoldedWindowAttention
from .heads import Heads
from .kinds import Kind, dropout_of, merge_heads, packed_heads, register_kind, split_heads
from .vit import MapKind, table_bias


class WindowKind(Kind):
    """Base for layers whose inputs are windows."""

    windowed = True

    def branch(self, attn: nn.Module, block: nn.Module) -> tuple[nn.Module, str] | None:
        """Methods of Swin's, MaxViT's and GC ViT's blocks merge the windows; elsewhere the block's forward does."""
        for name in ("_attn", "_partition_attn", "_window_attn"):
            if hasattr(block, name):
                return block, name
        return None


def add_window_mask(bias: Tensor, mask: Tensor | None, batch: int) -> Tensor:
    """The position bias (1, H, N, N) with the mask (windows, N, N) of shifted windows, for ``batch`` windows."""
    if mask is None:
        return bias
    return (bias + mask[:, None]).expand(batch // len(mask), *(-1,) * 4).flatten(0, 1)


@register_kind(swin_transformer.WindowAttention, FoldedWindowAttention)
class SwinKind(WindowKind):
    """Swin: a position bias from a table."""

    packed = True

    def window_grid(self, attn: nn.Module) -> tuple[int, int]:
        """The window's own."""
        return attn.window_size

    def split(self, attn: nn.Module, x: Tensor, mask: Tensor | None = None) -> Heads:
        """x: (B * windows, N, C), the windows of an image one after another; mask: (windows, N, N)."""
        bias = add_window_mask(table_bias(attn), mask, x.shape[0])
        return Heads(x, *packed_heads(attn, x), attn.scale, bias, dropout=dropout_of(attn), fused=attn.fused_attn)


class CosineKind(WindowKind):
    """Cosine attention with a learned scale per head, at most 100; the maps are made as tensors."""

    packed = True

    def window_grid(self, attn: nn.Module) -> tuple[int, int]:
        """The window's own."""
        return attn.window_size

    def split(self, attn: nn.Module, x: Tensor, mask: Tensor | None = None) -> Heads:
        """x: (B * windows, N, C); mask: (windows, N, N)."""
        q, k, v = packed_heads(attn, x)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        temperature = attn.logit_scale.view(-1, 1, 1).clamp(max=math.log(100)).exp()
        bias = add_window_mask(self.position_bias(attn), mask, x.shape[0])
        return Heads(x, q * temperature, k, v, 1.0, bias, dropout=dropout_of(attn))

    def position_bias(self, attn: nn.Module) -> Tensor:
        """(1, H, N, N)."""
        raise NotImplementedError


@register_kind(swin_transformer_v2.WindowAttention)
class SwinV2Kind(CosineKind):
    """SwinV2: a small network turns relative coordinates into the position bias."""

    def position_bias(self, attn: nn.Module) -> Tensor:
        """(1, H, N, N)."""
        table = attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2)
        return 16 * table[attn.relative_position_index].permute(2, 0, 1).sigmoid().unsqueeze(0)


@register_kind(swin_transformer_v2_cr.WindowMultiHeadAttention)
class SwinV2CrKind(CosineKind):
    """timm's other SwinV2, with a coordinate for every pair of tokens."""

    def position_bias(self, attn: nn.Module) -> Tensor:
        """(1, H, N, N)."""
        area = math.prod(attn.window_size)
        return attn.meta_mlp(attn.relative_coordinates_log).T.reshape(1, attn.num_heads, area, area)


@register_kind(gcvit.WindowAttentionGlobal)
class GlobalContextKind(WindowKind):
    """GC ViT: in every other block the queries come from the whole image."""

    def split(self, attn: nn.Module, x: Tensor, q_global: Tensor | None = None) -> Heads:
        """x: (B * windows, N, C); q_global: (B, N, C)."""
        if attn.use_global and q_global is not None:
            q = split_heads(q_global.flatten(1, -2).repeat_interleave(len(x) // len(q_global), dim=0), attn.num_heads)
            k, v = (split_heads(part, attn.num_heads) for part in attn.qkv(x).chunk(2, dim=-1))
        else:
            q, k, v = packed_heads(attn, x)
        return Heads(x, q, k, v, attn.scale, attn.rel_pos.get_bias(), dropout=dropout_of(attn))

    def is_square(self, attn: nn.Module) -> bool:
        """Global queries are not tokens of the window."""
        return not attn.use_global


@register_kind(maxxvit.AttentionCl)
class MaxVitKind(WindowKind):
    """MaxViT's windows and grids, channels last."""

    def split(self, attn: nn.Module, x: Tensor, shared_rel_pos: Tensor | None = None) -> Heads:
        """x: (B * windows, height, width, C); shared_rel_pos: (1, H, N, N)."""
        if attn.head_first:
            q, k, v = split_heads(attn.qkv(x).flatten(1, -2), attn.num_heads).chunk(3, dim=-1)
        else:
            q, k, v = packed_heads(attn, x)
        bias = shared_rel_pos if attn.rel_pos is None else attn.rel_pos.get_bias()
        return Heads(x, q, k, v, attn.scale, bias, dropout=dropout_of(attn), fused=attn.fused_attn)


@register_kind(maxxvit.Attention2d)
class MaxVitMapKind(MapKind, WindowKind):
    """MaxViT's windows and grids on feature maps; in CoAtNet, the whole map."""

    stream = "norm2"

    def split(self, attn: nn.Module, x: Tensor, shared_rel_pos: Tensor | None = None) -> Heads:
        """x: (B * windows, C, height, width); shared_rel_pos: (1, H, N, N)."""
        packed = attn.qkv(x).flatten(2)
        if attn.head_first:
            q, k, v = packed.unflatten(1, (attn.num_heads, -1)).chunk(3, dim=2)
        else:
            q, k, v = packed.unflatten(1, (3, attn.num_heads, -1)).unbind(1)
        bias = shared_rel_pos if attn.rel_pos is None else attn.rel_pos.get_bias()
        q, k, v = (part.mT.contiguous() for part in (q, k, v))
        return Heads(x, q, k, v, attn.scale, bias, dropout=dropout_of(attn), fused=attn.fused_attn)

    def branch(self, attn: nn.Module, block: nn.Module) -> tuple[nn.Module, str]:
        """A CoAtNet block has no windows to merge."""
        return super().branch(attn, block) or (attn, "forward")


@register_kind(vision_transformer_sam.Attention)
class SamKind(Kind):
    """SAM's ViT: decomposed relative positions, in windows or over the whole map."""

    packed = True
    windowed = True
    stream = "norm2"

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B * windows, height, width, C)."""
        q, k, v = packed_heads(attn, x)
        q, k, bias = attn.q_norm(q), attn.k_norm(k), None
        if attn.use_rel_pos:
            size = x.shape[1:3]
            flat = q.flatten(0, 1)
            bias = vision_transformer_sam.get_decomposed_rel_pos_bias(flat, attn.rel_pos_h, attn.rel_pos_w, size, size)
            bias = bias.view(*q.shape[:3], -1)
        elif attn.rope is not None:
            rope = attn.rope.get_embed()
            q, k = (apply_rot_embed_cat(part, rope).type_as(v) for part in (q, k))
        return Heads(x, q, k, v, attn.scale, bias, dropout=dropout_of(attn), fused=attn.fused_attn)

    def branch(self, attn: nn.Module, block: nn.Module) -> tuple[nn.Module, str] | None:
        """Windows are merged inside the block's forward; a block without them has all tokens."""
        return None if getattr(block, "window_size", 0) else (attn, "forward")


@register_kind(nest.Attention)
class NestKind(WindowKind):
    """NesT: the windows have an axis of their own."""

    raster = False

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B, windows, N, C)."""
        q, k, v = packed_heads(attn, x.flatten(0, 1))
        return Heads(x, q, k, v, attn.scale, dropout=dropout_of(attn), fused=attn.fused_attn)

    def unprojected(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """(B * windows, H, N, D) -> (B, windows, N, D * H): the heads are the last axis, unlike elsewhere."""
        return y.permute(0, 2, 3, 1).reshape(heads.x.shape)

    def branch(self, attn: nn.Module, block: nn.Module) -> tuple[nn.Module, str]:
        """The layer sees all windows."""
        return attn, "forward"


@register_kind(hiera.MaskUnitAttention)
class HieraKind(Kind):
    """Hiera: mask units or the whole sequence; at the head of a stage queries are max-pooled by ``q_stride``.

    The tokens of a unit are not neighbours in the sequence: token ``n`` belongs to unit ``n % units``.
    """

    packed = True
    windowed = True
    raster = False

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B, N, C); heads have B * units batches."""
        units = x.shape[1] // (attn.q_stride * attn.window_size) if attn.use_mask_unit_attn else 1
        packed = attn.qkv(x).unflatten(-1, (3, attn.heads, -1)).unflatten(1, (-1, units))
        q, k, v = packed.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)  # (B * units, H, N / units, D)
        if attn.q_stride > 1:
            q = q.unflatten(2, (attn.q_stride, -1)).amax(dim=2)
        return Heads(x, q.contiguous(), k.contiguous(), v.contiguous(), attn.scale, fused=attn.fused_attn)

    def unprojected(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """(B * units, H, Q / units, D) -> (B, Q, H * D)."""
        y = y.unflatten(0, (len(heads.x), -1))
        return y.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)

    def num_heads(self, attn: nn.Module) -> int:
        """H."""
        return attn.heads

    def is_square(self, attn: nn.Module) -> bool:
        """Not at the head of a stage."""
        return attn.q_stride == 1


@register_kind(hieradet_sam2.MultiScaleAttention)
class HieraDetKind(Kind):
    """SAM 2's Hiera: windows cut by the block, queries pooled over the map."""

    windowed = True
    stream = "norm2"

    def split(self, attn: nn.Module, x: Tensor) -> Heads:
        """x: (B * windows, height, width, C)."""
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
        if attn.q_pool is not None:
            q = attn.q_pool(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        size = q.shape[1:3]
        q, k, v = (split_heads(part.flatten(1, 2), attn.num_heads) for part in (q, k, v))
        return Heads(x, q, k, v, attn.scale, fused=attn.fused_attn, context=size)

    def unprojected(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """(B * windows, H, Q, D) -> (B * windows, height, width, H * D)."""
        return merge_heads(y).unflatten(1, heads.context)

    def is_square(self, attn: nn.Module) -> bool:
        """Not at the head of a stage."""
        return attn.q_pool is None

    def branch(self, attn: nn.Module, block: nn.Module) -> tuple[nn.Module, str] | None:
        """Windows are merged inside the block's forward; a block without them has all tokens."""
        return None if block.is_windowed else (attn, "forward")


@register_kind(pvt_v2.Attention, twins.GlobalSubSampleAttn)
class ReducedKeysKind(Kind):
    """PVT v2 and Twins: keys and values from a downsampled feature map."""

    def split(self, attn: nn.Module, x: Tensor, size: tuple[int, int]) -> Heads:
        """x: (B, height * width, C); size: height and width."""
        q, reduced = split_heads(attn.q(x), attn.num_heads), x
        if attn.sr is not None:
            reduced = x.mT.unflatten(2, size)
            if getattr(attn, "pool", None) is not None:
                reduced = attn.pool(reduced)
            reduced = attn.norm(attn.sr(reduced).flatten(2).mT)
            if getattr(attn, "act", None) is not None:
                reduced = attn.act(reduced)
        k, v = (split_heads(part, attn.num_heads) for part in attn.kv(reduced).chunk(2, dim=-1))
        return Heads(x, q, k, v, attn.scale, dropout=dropout_of(attn), fused=attn.fused_attn)

    def is_square(self, attn: nn.Module) -> bool:
        """Only where keys are not reduced."""
        return attn.sr is None


@register_kind(twins.LocallyGroupedAttn)
class TwinsWindowKind(Kind):
    """Twins' windows, cut inside the layer from a padded map."""

    windowed = True

    def split(self, attn: nn.Module, x: Tensor, size: tuple[int, int]) -> Heads:
        """x: (B, height * width, C); size: height and width."""
        rows, columns = (math.ceil(length / attn.ws) for length in size)
        padding = 0, 0, 0, columns * attn.ws - size[1], 0, rows * attn.ws - size[0]
        windows = F.pad(x.unflatten(1, size), padding).unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
        q, k, v = packed_heads(attn, windows.transpose(2, 3).flatten(0, 2).flatten(1, 2))
        context = rows, columns, size
        return Heads(x, q, k, v, attn.scale, dropout=dropout_of(attn), fused=attn.fused_attn, context=context)

    def unprojected(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """(B * windows, H, N, D) -> (B, height * width, H * D)."""
        rows, columns, (height, width) = heads.context
        windows = merge_heads(y).unflatten(1, (attn.ws, attn.ws)).unflatten(0, (-1, rows, columns))
        return windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width].flatten(1, 2)
