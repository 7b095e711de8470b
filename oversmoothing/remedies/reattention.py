"""Re-attention (DeepViT): attention maps mixed over the heads and normalised. A baseline, slow."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..attention import Heads
from .base import AttentionRemedy, LayerShape, register_remedy


@register_remedy
@dataclass(frozen=True, kw_only=True)
class Reattention(AttentionRemedy):
    """``BatchNorm(mix(A)) t`` in place of ``A``: a 1x1 convolution over the heads, then batch norm of each head's map.

    It does not start as the identity: the convolution has torch's default initialisation. It needs every map as a
    tensor, and in training the batch statistics of all maps. ``t`` is 1, or ``D^-1/2`` with ``transform_scale`` (the
    authors' S models). The paper names layer norm or batch norm; the code always uses batch norm. Dropout falls on the
    softmax.
    """

    name = "reattention"
    formula = "BatchNorm(mix over heads(A)) t v"
    source = "DeepViT, arXiv 2103.11886"
    cost = "N x N maps as tensors; no fused attention"
    needs_maps = True
    drops_softmax = True
    square = False

    transform_scale: bool = False

    def new_state(self, layer: LayerShape) -> dict[str, Tensor | nn.Module]:
        """``reattention_matrix`` and ``reattention_norm``."""
        heads = layer.num_heads
        return {"reattention_matrix": nn.Conv2d(heads, heads, 1), "reattention_norm": nn.BatchNorm2d(heads)}

    def maps(self, attn: nn.Module, maps: Tensor, heads: Heads) -> Tensor:
        """The definition."""
        maps = attn.reattention_norm(attn.reattention_matrix(maps))
        return maps * heads.v.shape[-1] ** -0.5 if self.transform_scale else maps
