"""FeatScale: re-weight the mean token and the rest of each attention branch's output.

With ``DC[y]`` the mean over the tokens and ``HC[y] = y - DC[y]``, each block gets two learnable vectors of shape
(dim,), ``lamb1`` for DC and ``lamb2`` for HC, zero at the start, on the output ``y`` of its attention branch (after
``proj``, before LayerScale and drop-path)::

    y + gain (lamb1 * DC[y] + lamb2 * HC[y])                        (arXiv 2203.05962, FeatScale)

``feat_scale`` is this definition. ``fold_feat_scale`` is the same inside ``proj``, where both blocks do it if
the attention layer allows it (``folding.can_fold``) and no dropout comes between ``proj`` and the mean.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.layers import Attention, use_fused_attn
from timm.models.cait import LayerScaleBlock, TalkingHeadAttn
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention, window_partition, window_reverse
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..fused.folding import FoldedAttention, affine, can_fold, has_hooks
from ..fused.talking_heads import FusedTalkingHeadAttn
from ..fused.windows import FoldedWindowAttention
from .base import BranchRemedy, Layer, LayerShape, Operator, register_remedy

# The paper's equation has gain 1. Its code for the DeiT backbone adds both bands a second time, and the published
# DeiT weights go with that code: gain 2. Its CaiT and Swin code adds them once.
DEIT_GAIN = 2.0
CAIT_GAIN = 1.0
SWIN_GAIN = 1.0


def feat_scale(y: Tensor, lamb1: Tensor, lamb2: Tensor, gain: float) -> Tensor:
    """Adds the re-weighted bands of ``y`` to it.

    Args:
        y: Features of shape (B, N, C); the mean is over all N tokens, prefix tokens included.
        lamb1: Shape (C,), weight of the DC part.
        lamb2: Shape (C,), weight of the high-pass part.
        gain: Dimensionless factor on both.

    Returns:
        Shape (B, N, C), the dtype of ``y``; equal to ``y`` where both weights are zero.
    """
    dc = y.mean(dim=1, keepdim=True)
    return y + gain * (lamb1.to(y.dtype) * dc + lamb2.to(y.dtype) * (y - dc))


def fold_feat_scale(
    weight: Tensor, offset: Tensor | None, mean: Tensor, lamb1: Tensor, lamb2: Tensor, gain: float
) -> tuple[Tensor, Tensor]:
    """FeatScale of ``y = affine(x, weight, offset)`` as another weight and offset.

    ``y + gain (lamb1 DC + lamb2 HC) = (1 + gain lamb2) y + gain (lamb1 - lamb2) DC``: the first term scales the rows of
    the weight, the second is one vector an image, since ``DC[y]`` is the projection of the mean token of ``x``.

    Args:
        weight: Shape (C, C_in).
        offset: Shape (C,) or (B, 1, C), or None; on Swin also (B, windows, 1, C).
        mean: Mean token of ``x``, shape (B, 1, C_in); on Swin (B, 1, 1, C_in), or of each window (B, windows, 1, C_in).
        lamb1: As in ``feat_scale``.
        lamb2: As in ``feat_scale``.
        gain: As in ``feat_scale``.

    Returns:
        Weight (C, C_in) and offset (B, 1, C), on Swin (B, 1 or windows, 1, C).
    """
    dc = affine(mean, weight, offset)
    if dc.dim() == 4:  # the windows of an image are of one size
        dc = dc.mean(dim=1, keepdim=True)
    high = 1 + gain * lamb2.to(weight.dtype)
    dc_offset = gain * (lamb1 - lamb2).to(dc.dtype) * dc
    return high[:, None] * weight, dc_offset if offset is None else high * offset + dc_offset


def _folds(block: nn.Module) -> bool:
    attn = block.attn
    return (
        block.fused_attn
        and hasattr(attn, "unprojected")
        and can_fold(attn)
        and not has_hooks(attn)
        and not (block.training and attn.proj_drop.p > 0)
    )


class FeatScaleBlock(Block):
    """timm's ``Block`` with FeatScale; fits the ``block_fn`` slot of any timm ``VisionTransformer``.

    Args:
        dim: Channels C of the tokens, and the length of ``lamb1`` and ``lamb2``.
        *args: As timm's ``Block``.
        gain: See ``DEIT_GAIN``; for another value pass ``block_fn=functools.partial(FeatScaleBlock, gain=1.0)``.
        **kwargs: As timm's ``Block``.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self, dim: int, *args, gain: float = DEIT_GAIN, attn_layer=Attention, device=None, dtype=None, **kwargs
    ) -> None:
        if attn_layer in (Attention, "", "attn"):
            attn_layer = FoldedAttention  # the same layer, which hands out its projection
        super().__init__(dim, *args, attn_layer=attn_layer, device=device, dtype=dtype, **kwargs)
        self.fused_attn = use_fused_attn()
        self.gain = gain
        self.lamb1 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.lamb2 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Zero both weights, where FeatScale is the identity (timm calls this for models built on the meta device)."""
        nn.init.zeros_(self.lamb1)
        nn.init.zeros_(self.lamb2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C); ``attn_mask`` and ``is_causal`` go to the attention layer."""
        x = x + self.drop_path1(self.ls1(self.attention_branch(self.norm1(x), attn_mask, is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attention_branch(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, num_tokens: int | None = None
    ) -> Tensor:
        """Normed tokens (B, N, C) -> attention with FeatScale, (B, N, C) or the first ``num_tokens`` of it."""
        if not torch.jit.is_scripting():
            if _folds(self):
                y, weight, offset = self.attn.unprojected(x, attn_mask, is_causal)
                mean = y.mean(dim=1, keepdim=True)
                weight, offset = fold_feat_scale(weight, offset, mean, self.lamb1, self.lamb2, self.gain)
                return affine(y[:, :num_tokens], weight, offset)
        y = self.attn(x, attn_mask=attn_mask, is_causal=is_causal)
        return feat_scale(y, self.lamb1, self.lamb2, self.gain)[:, :num_tokens]


class FeatScaleLayerScaleBlock(LayerScaleBlock):
    """CaiT's block with FeatScale; fits the ``block_layers`` slot of timm's ``Cait``.

    Args:
        dim: Channels C of the tokens, and the length of ``lamb1`` and ``lamb2``.
        *args: As timm's ``LayerScaleBlock``.
        gain: See ``CAIT_GAIN``.
        **kwargs: As timm's ``LayerScaleBlock``.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self, dim: int, *args, gain: float = CAIT_GAIN, attn_block=TalkingHeadAttn, device=None, dtype=None, **kwargs
    ) -> None:
        if attn_block is TalkingHeadAttn:
            attn_block = FusedTalkingHeadAttn  # the same layer, faster, which hands out its projection
        super().__init__(dim, *args, attn_block=attn_block, device=device, dtype=dtype, **kwargs)
        self.fused_attn = use_fused_attn()
        self.gain = gain
        self.lamb1 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.lamb2 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.drop_path(self.gamma_1 * self.attention_branch(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))

    def attention_branch(self, x: Tensor) -> Tensor:
        """Normed tokens (B, N, C) -> attention with FeatScale, (B, N, C)."""
        if not torch.jit.is_scripting():
            if _folds(self):
                y, weight, offset = self.attn.unprojected(x)
                mean = y.mean(dim=1, keepdim=True)
                return affine(y, *fold_feat_scale(weight, offset, mean, self.lamb1, self.lamb2, self.gain))
        return feat_scale(self.attn(x), self.lamb1, self.lamb2, self.gain)


class FeatScaleSwinBlock(SwinTransformerBlock):
    """Swin's block with FeatScale, on the whole feature map: after its windows are merged and shifted back.

    Args:
        dim: Channels C of the tokens, and the length of ``lamb1`` and ``lamb2``.
        *args: As timm's ``SwinTransformerBlock``.
        gain: 1, the paper's equation and code.
        **kwargs: As timm's ``SwinTransformerBlock``.
    """

    folds = True

    def __init__(self, dim: int, *args, gain: float = SWIN_GAIN, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, *args, device=device, dtype=dtype, **kwargs)
        self.gain = gain
        self.lamb1 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.lamb2 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """timm's start values, and zero both weights (timm's constructor calls this before there are any)."""
        super().reset_parameters()
        if hasattr(self, "lamb1"):
            nn.init.zeros_(self.lamb1)
            nn.init.zeros_(self.lamb2)

    def _attn(self, x: Tensor) -> Tensor:
        """Normed tokens (B, height, width, C) -> attention with FeatScale, the same shape."""
        size = x.shape[1:3]
        if self._folds(size):
            return self._folded(x, size)
        y = super()._attn(x)
        return feat_scale(y.flatten(1, 2), self.lamb1, self.lamb2, self.gain).view_as(y)

    def _folds(self, size: Sequence[int]) -> bool:
        """Whether the projection can do it: windows hold no padding, and no dropout comes between it and the mean."""
        attn = self.attn
        padded = any(length % window for length, window in zip(size, self.window_size, strict=True))
        folds = self.folds and isinstance(attn, FoldedWindowAttention) and attn.can_fold() and not has_hooks(attn)
        return folds and not padded and not (self.training and attn.proj_drop.p > 0)

    def _folded(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """The same with one projection: the mean over all windows is known before they are merged."""
        batch, shift, dims = x.shape[0], self.shift_size, (1, 2)  # len(x) would fix it in an exported graph
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims)
        mask = self.get_attn_mask(x) if self.dynamic_mask else self.attn_mask
        windows = window_partition(x, self.window_size).flatten(1, 2)
        y, weight, offset = self.attn.unprojected(windows, mask)
        y = y.unflatten(0, (batch, -1))  # (B, windows, N, H * D)
        if offset is not None and offset.dim() == 3:  # AttnScale's, one for each window
            offset, mean = offset.unflatten(0, (batch, -1)), y.mean(dim=2, keepdim=True)
        else:
            mean = y.mean(dim=(1, 2), keepdim=True)
        weight, offset = fold_feat_scale(weight, offset, mean, self.lamb1, self.lamb2, self.gain)
        y = affine(y, weight, offset).flatten(0, 1).unflatten(1, self.window_size)
        y = window_reverse(y, self.window_size, *size)
        return y.roll(shift, dims) if any(shift) else y


@register_remedy
@dataclass(frozen=True, kw_only=True)
class FeatScale(BranchRemedy):
    """``y + gain (lamb1 DC[y] + lamb2 HC[y])`` on the attention branch, both vectors over the channels, from zero.

    ``gain`` is 2 on timm's ``VisionTransformer``, as in the published weights, and 1, the paper's equation, elsewhere.
    """

    name = "featscale"
    formula = "(after the projection) y + gain (lamb1 DC[y] + lamb2 HC[y])"
    source = "arXiv 2203.05962, ICLR 2022"
    cost = "one pass over the branch; less where the projection does it"
    native = {
        Block: FeatScaleBlock,
        LayerScaleBlock: FeatScaleLayerScaleBlock,
        SwinTransformerBlock: FeatScaleSwinBlock,
    }
    # The same attention layers, which hand out their projection to these blocks.
    native_attention: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        Attention: FoldedAttention,
        TalkingHeadAttn: FusedTalkingHeadAttn,
        WindowAttention: FoldedWindowAttention,
    }

    gain: float | None = None
    lamb1: float = 0.0
    lamb2: float = 0.0

    def for_model(self, model: nn.Module) -> "FeatScale":
        """With the gain of the model's family, unless one was chosen."""
        if self.gain is not None:
            return self
        return dataclasses.replace(self, gain=DEIT_GAIN if isinstance(model, VisionTransformer) else 1.0)

    def objection(self, model: nn.Module, layers: list[Layer]) -> str | None:
        """Where windows are merged together with the residual sum."""
        if any(layer.kind.branch(layer.attn, layer.block) is None for layer in layers):
            return "its blocks have no method that returns the attention branch for all tokens of an image"
        return None

    def native_attributes(self) -> dict[str, float]:
        """``gain``."""
        return {"gain": self.gain}

    def new_state(self, layer: LayerShape) -> dict[str, Tensor | nn.Module]:
        """``lamb1`` and ``lamb2`` (C,)."""
        return {name: torch.full((layer.dim,), float(getattr(self, name))) for name in ("lamb1", "lamb2")}

    def branch(self, block: nn.Module, y: Tensor, token_mean: Operator) -> Tensor:
        """``(1 + gain lamb2) y + gain (lamb1 - lamb2) DC[y]``."""
        lamb1, lamb2 = block.lamb1.to(y.dtype), block.lamb2.to(y.dtype)
        return (1 + self.gain * lamb2) * y + self.gain * (lamb1 - lamb2) * token_mean(y)
