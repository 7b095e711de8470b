"""FeatScale: re-weight the mean token and the rest of each attention branch's output.

With ``DC[y]`` the mean over the tokens and ``HC[y] = y - DC[y]``, each block gets two learnable vectors of shape
(dim,), ``lamb1`` for DC and ``lamb2`` for HC, zero at the start, on the output ``y`` of its attention branch (after
``proj``, before LayerScale and drop-path)::

    y + gain (lamb1 * DC[y] + lamb2 * HC[y])                        (arXiv 2203.05962, FeatScale)

``feat_scale`` is this definition. ``projection_gains`` folds the same into ``proj``. The blocks use it if the attention
layer allows it (its ``foldable``) and there is no dropout between ``proj`` and the mean; otherwise they call
``fused_feat_scale``. With the projection, CaiT's block folds LayerScale, so backward need not keep the branch for
its gradient; not in float16.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.layers import Attention, use_fused_attn
from timm.models.cait import LayerScaleBlock, TalkingHeadAttn
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention, window_partition, window_reverse
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..fused.blocks import FoldedBlock, call_mlp
from ..fused.folding import Fold, Foldable, FoldedAttention, Gains, autocast_dtype, call, folded, has_hooks, recorded
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


def fused_feat_scale(y: Tensor, lamb1: Tensor, lamb2: Tensor, gain: float) -> Tensor:
    """``feat_scale`` as ``(1 + gain lamb2) y + gain (lamb1 - lamb2) DC[y]``: two passes over ``y``, nothing else kept.

    Used where FeatScale cannot be folded, for example with dropout after the projection. Arguments as ``feat_scale``.
    """
    offset = gain * (lamb1 - lamb2).to(y.dtype) * y.mean(dim=1, keepdim=True)
    return torch.addcmul(offset, y, 1 + gain * lamb2.to(y.dtype))


def projection_gains(
    gain: float,
    windows: bool,
    inner: Callable[..., Gains],
    settings: tuple,
    lamb1: Tensor,
    lamb2: Tensor,
    *parameters: Tensor,
) -> Gains:
    """FeatScale of an attention layer's output, as factors on its projection.

    ``y + gain (lamb1 DC + lamb2 HC) = (1 + gain lamb2) y + gain (lamb1 - lamb2) DC``: the first term scales the rows of
    the weight, the second is one vector per image, since ``DC[y]`` is the projection of the mean of the heads. The
    layer's own means and the bias are the same for all tokens: both terms together scale them, by ``1 + gain lamb1``.

    Args:
        gain: As in ``feat_scale``.
        windows: Whether the layer's own means are means over windows; DC is the mean over the whole image.
        inner: Makes the layer's own gains from ``settings`` and ``parameters``.
        settings: See ``folding.Foldable``.
        lamb1: Shape (C,), or (L, C) for L layers; then all other tensors are of L layers too.
        lamb2: As ``lamb1``.
        *parameters: The layer's own parameters, see ``inner``.

    Returns:
        Gains for the heads, for the mean of the heads and, after it, for the layer's own means. With ``windows``, gains
        for the averages of these means over the image follow.
    """
    weight, of_means, _, _ = inner(*settings, *parameters)
    lamb1, lamb2 = (gain * lamb.unsqueeze(-1) for lamb in (lamb1, lamb2))
    high, mean, both = 1 + lamb2, lamb1 - lamb2, 1 + lamb1
    if windows:
        of_means = [factor * of_mean for factor in (high, mean) for of_mean in of_means]
    else:
        of_means = [both * of_mean for of_mean in of_means]
    means = (mean if weight is None else mean * weight, *of_means)
    return Gains(high if weight is None else high * weight, means, both.squeeze(-1))


def layer_scale_gains(inner: Callable[..., Gains], settings: tuple, gamma: Tensor, *parameters: Tensor) -> Gains:
    """LayerScale behind a layer or block: all that is added to the residual stream, times ``gamma``.

    Args:
        inner: Makes the gains without it from ``settings`` and ``parameters``; of its gains only ``shift`` may be None.
        settings: See ``folding.Foldable``.
        gamma: Shape (C,), or (L, C) for L layers.
        *parameters: See ``inner``.
    """
    weight, of_means, bias, shift = inner(*settings, *parameters)
    rows = gamma.unsqueeze(-1)
    of_means = tuple(rows * of_mean for of_mean in of_means)
    return Gains(rows * weight, of_means, gamma * bias, None if shift is None else gamma * shift)


def _foldable(block: nn.Module, enabled: bool, windows: bool = False) -> Foldable | None:
    """What the fold of a block's attention branch is made of; None where it cannot be folded."""
    attn = block.attn
    if (
        not enabled
        or not hasattr(attn, "foldable")
        or has_hooks(attn)
        or has_hooks(dropout := attn.proj_drop)
        or (block.training and dropout.p > 0)
        or (inner := attn.foldable()) is None
    ):
        return None
    settings = block.gain, windows, inner.gains, inner.settings
    parameters = block.lamb1, block.lamb2, *inner.parameters
    return Foldable(projection_gains, settings, inner.weight, inner.bias, parameters, inner.num_heads)


def _project(fold: Fold, heads: Tensor, means: Tensor | None, num_tokens: int | None = None) -> Tensor:
    mean = heads.mean(dim=1)
    if num_tokens is not None:
        heads = heads[:, :num_tokens]
    return fold.project(heads, mean if means is None else torch.cat([mean, means], dim=-1))


class FeatScaleBlock(FoldedBlock):
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
            attn_layer = FoldedAttention  # the same layer, in two halves
        super().__init__(dim, *args, attn_layer=attn_layer, device=device, dtype=dtype, **kwargs)
        self.fused_attn = use_fused_attn()
        self.gain = gain
        self.lamb1 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.lamb2 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Sets both weights to zero: FeatScale is the identity (timm calls this for models from the meta device)."""
        nn.init.zeros_(self.lamb1)
        nn.init.zeros_(self.lamb2)

    def attention_branch(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, num_tokens: int | None = None
    ) -> Tensor:
        """Normed tokens (B, N, C) -> attention with FeatScale, (B, N, C) or the first ``num_tokens`` of it."""
        if not torch.jit.is_scripting():
            fold = folded(self)
            if fold is not None:
                return _project(fold, *self.attn.unprojected(x, attn_mask, is_causal), num_tokens)
        y = self.attn(x, attn_mask=attn_mask, is_causal=is_causal)
        if self.fused_attn:
            return fused_feat_scale(y, self.lamb1, self.lamb2, self.gain)[:, :num_tokens]
        return feat_scale(y, self.lamb1, self.lamb2, self.gain)[:, :num_tokens]

    def first_tokens(self, x: Tensor, num_tokens: int) -> Tensor:
        """The attention branch for the first ``num_tokens``: normed tokens (B, N, C) -> (B, num_tokens, C)."""
        return self.attention_branch(x, num_tokens=num_tokens)

    @torch.jit.unused
    def foldable(self) -> Foldable | None:
        """What the fold of the attention branch is made of; None where it cannot be folded."""
        return _foldable(self, self.fused_attn)


def _folds_layer_scale(weight: Tensor) -> bool:
    # In float16 a weight times LayerScale's start, 1e-6, would be zero; a graph may be converted to float16 later.
    if recorded(weight) or torch.compiler.is_exporting():
        return False
    return (autocast_dtype(weight) or weight.dtype) != torch.float16


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
            attn_block = FusedTalkingHeadAttn  # the same layer, faster and in two halves
        super().__init__(dim, *args, attn_block=attn_block, device=device, dtype=dtype, **kwargs)
        self.fused_attn = use_fused_attn()
        self.gain = gain
        self.lamb1 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.lamb2 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if torch.jit.is_scripting():
            x = x + self.drop_path(self.scaled_branch(self.norm1(x)))
            return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
        x = x + call(self, "drop_path", self.scaled_branch(self.norm1(x)))
        return x + call(self, "drop_path", self.gamma_2 * call_mlp(self.mlp, self.norm2(x)))

    def scaled_branch(self, x: Tensor) -> Tensor:
        """Normed tokens (B, N, C) -> attention with FeatScale and LayerScale, (B, N, C)."""
        if not torch.jit.is_scripting():
            fold = folded(self)
            if fold is not None:
                y = _project(fold, *self.attn.unprojected(x))
                return y if fold.layer_scale else self.gamma_1 * y
        y = self.attn(x)
        if self.fused_attn:
            return self.gamma_1 * fused_feat_scale(y, self.lamb1, self.lamb2, self.gain)
        return self.gamma_1 * feat_scale(y, self.lamb1, self.lamb2, self.gain)

    @torch.jit.unused
    def foldable(self) -> Foldable | None:
        """What the fold of the attention branch is made of, with LayerScale; None where it cannot be folded."""
        foldable = _foldable(self, self.fused_attn)
        if foldable is None or not _folds_layer_scale(foldable.weight):
            return foldable
        gains, settings, weight, bias, parameters, num_heads, _ = foldable
        return Foldable(
            layer_scale_gains, (gains, settings), weight, bias, (self.gamma_1, *parameters), num_heads, layer_scale=True
        )


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
        """Start values of timm, and zero for both weights (timm's constructor calls this before they exist)."""
        super().reset_parameters()
        if hasattr(self, "lamb1"):
            nn.init.zeros_(self.lamb1)
            nn.init.zeros_(self.lamb2)

    def _attn(self, x: Tensor) -> Tensor:
        """Normed tokens (B, height, width, C) -> attention with FeatScale, the same shape."""
        size = x.shape[1:3]
        # With padding, the windows' means would include padded tokens.
        padded = any(length % window for length, window in zip(size, self.window_size, strict=True))
        fold = None if padded else folded(self)
        if fold is not None:
            return self._folded(fold, x, size)
        y = super()._attn(x)
        scaled = fused_feat_scale if self.folds else feat_scale
        return scaled(y.flatten(1, 2), self.lamb1, self.lamb2, self.gain).view_as(y)

    def foldable(self) -> Foldable | None:
        """What the fold of the attention branch is made of; None where it cannot be folded."""
        return _foldable(self, self.folds, windows=True)

    def _folded(self, fold: Fold, x: Tensor, size: Sequence[int]) -> Tensor:
        """``_attn`` with one projection: the mean over all windows is known before they are merged."""
        batch, shift, dims = x.shape[0], self.shift_size, (1, 2)  # len(x) would fix it in an exported graph
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims)
        mask = self.get_attn_mask(x) if self.dynamic_mask else self.attn_mask
        y, means = self.attn.unprojected(window_partition(x, self.window_size).flatten(1, 2), mask)
        of_image = y.unflatten(0, (batch, -1)).mean(dim=(1, 2))  # all windows have the same size
        each = y.shape[0] // batch
        if means is None:
            means = of_image.repeat_interleave(each, dim=0)
        else:
            of_windows = means.unflatten(0, (batch, -1)).mean(dim=1).repeat_interleave(each, dim=0)
            means = torch.cat([of_image.repeat_interleave(each, dim=0), means, of_windows], dim=-1)
        y = window_reverse(fold.project(y, means).unflatten(1, self.window_size), self.window_size, *size)
        return y.roll(shift, dims) if any(shift) else y


@register_remedy
@dataclass(frozen=True, kw_only=True)
class FeatScale(BranchRemedy):
    """``y + gain (lamb1 DC[y] + lamb2 HC[y])`` on the attention branch; both are vectors over channels, from zero.

    ``gain`` is 2 on timm's ``VisionTransformer``, as in the published weights, and 1, the paper's equation, elsewhere.
    """

    name = "featscale"
    formula = "(after the projection) y + gain (lamb1 DC[y] + lamb2 HC[y])"
    source = "arXiv 2203.05962, ICLR 2022"
    cost = "one pass over the branch; less where the projection does it"
    native = {
        Block: FeatScaleBlock,
        FoldedBlock: FeatScaleBlock,
        LayerScaleBlock: FeatScaleLayerScaleBlock,
        SwinTransformerBlock: FeatScaleSwinBlock,
    }
    # timm's attention layer -> the same layer in two halves, so that these blocks can fold into its projection.
    native_attention: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        Attention: FoldedAttention,
        TalkingHeadAttn: FusedTalkingHeadAttn,
        WindowAttention: FoldedWindowAttention,
    }

    gain: float | None = None
    lamb1: float = 0.0
    lamb2: float = 0.0

    def for_model(self, model: nn.Module) -> "FeatScale":
        """Fills in the gain of the model's family, unless one was given."""
        if self.gain is not None:
            return self
        return dataclasses.replace(self, gain=DEIT_GAIN if isinstance(model, VisionTransformer) else 1.0)

    def objection(self, model: nn.Module, layers: list[Layer]) -> str | None:
        """Refuses blocks that merge their windows together with the residual sum."""
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
