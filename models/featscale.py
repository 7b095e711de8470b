"""FeatScale: re-weight the mean token and the rest of each attention branch's output.

With ``DC[y]`` the mean over the tokens and ``HC[y] = y - DC[y]``, each block gets two learnable vectors of shape
(dim,), ``lamb1`` for DC and ``lamb2`` for HC, zero at the start, on the output ``y`` of its attention branch (after
``proj``, before LayerScale and drop-path)::

    y + gain (lamb1 * DC[y] + lamb2 * HC[y])                        (arXiv 2203.05962, FeatScale)
"""
import torch
from timm.models.cait import LayerScaleBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# The paper's equation has gain 1. Its code for the DeiT backbone adds both bands a second time, and the published
# DeiT weights go with that code: gain 2. Its CaiT code adds them once.
DEIT_GAIN = 2.0
CAIT_GAIN = 1.0


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


class FeatScaleBlock(Block):
    """timm's ``Block`` with FeatScale; fits the ``block_fn`` slot of any timm ``VisionTransformer``.

    Args:
        dim: Channels C of the tokens, and the length of ``lamb1`` and ``lamb2``.
        *args: As timm's ``Block``.
        gain: See ``DEIT_GAIN``; for another value pass ``block_fn=functools.partial(FeatScaleBlock, gain=1.0)``.
        **kwargs: As timm's ``Block``.
    """

    def __init__(self, dim: int, *args, gain: float = DEIT_GAIN, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, *args, device=device, dtype=dtype, **kwargs)
        self.gain = gain
        self.lamb1 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.lamb2 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Zero both weights, where FeatScale is the identity (timm calls this for models built on the meta device)."""
        nn.init.zeros_(self.lamb1)
        nn.init.zeros_(self.lamb2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C); ``attn_mask`` and ``is_causal`` go to the attention layer."""
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(feat_scale(y, self.lamb1, self.lamb2, self.gain)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class FeatScaleLayerScaleBlock(LayerScaleBlock):
    """CaiT's block with FeatScale; fits the ``block_layers`` slot of timm's ``Cait``.

    Args:
        dim: Channels C of the tokens, and the length of ``lamb1`` and ``lamb2``.
        *args: As timm's ``LayerScaleBlock``.
        gain: See ``CAIT_GAIN``.
        **kwargs: As timm's ``LayerScaleBlock``.
    """

    def __init__(self, dim: int, *args, gain: float = CAIT_GAIN, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, *args, device=device, dtype=dtype, **kwargs)
        self.gain = gain
        self.lamb1 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.lamb2 = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        y = feat_scale(self.attn(self.norm1(x)), self.lamb1, self.lamb2, self.gain)
        x = x + self.drop_path(self.gamma_1 * y)
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
