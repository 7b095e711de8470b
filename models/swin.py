"""Swin backbones with the remedies: timm's ``SwinTransformer``, converted when it is built.

AttnScale acts on the maps of each window: N is a window's 49 tokens. With shifted windows, masked pairs get
``-lamb / 49`` too, since the mask is added before the softmax. FeatScale's mean is over the whole feature map, after
the windows are merged and shifted back; its gain is 1. The plain baselines are timm's own, for example
``swin_small_patch4_window7_224``; the variants are named after them.
"""

from functools import partial

from timm.layers import PatchEmbed, use_fused_attn
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from oversmoothing import add_remedy, set_fused

from .registry import data_configs, register_variants

__all__ = ["Swin"]  # registration adds the name of each variant


class Swin(SwinTransformer):
    """timm's ``SwinTransformer`` with remedies, the same as ``add_remedy(SwinTransformer(...), remedies)``.

    Args:
        *args: As timm's.
        remedies: Names, or names with their options, as ``add_remedy`` takes them.
        pos_drop_rate: Dropout on the embedded patches, as in the paper's code (timm's Swin has none).
        **kwargs: As timm's.
    """

    def __init__(self, *args, remedies: tuple[str, ...] | dict = (), pos_drop_rate: float = 0.0, **kwargs) -> None:
        super().__init__(*args, embed_layer=partial(DroppedPatchEmbed, drop=pos_drop_rate), **kwargs)
        if remedies:
            add_remedy(self, remedies)
            del self.remedies  # the record of added remedies; here they belong to the class
        if not use_fused_attn():
            set_fused(self, False)


class DroppedPatchEmbed(PatchEmbed):
    """timm's ``PatchEmbed``, followed by dropout."""

    def __init__(self, *args, drop: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> embedded patches."""
        return self.drop(super().forward(x))


_ATTNSCALE = dict(remedies=("attnscale",))
_FEATSCALE = dict(remedies=("featscale",))
_BOTH = dict(remedies=("attnscale", "featscale"))

# Arguments as timm's models of these names (arXiv 2103.14030, section 3.3).
_TINY = dict(patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
_SMALL = dict(patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
_BASE = dict(patch_size=4, window_size=7, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))

_VARIANTS = {
    "attnscale_swin_tiny_patch4_window7_224": (_ATTNSCALE, _TINY, 224),
    "attnscale_swin_small_patch4_window7_224": (_ATTNSCALE, _SMALL, 224),
    "attnscale_swin_base_patch4_window7_224": (_ATTNSCALE, _BASE, 224),
    "featscale_swin_tiny_patch4_window7_224": (_FEATSCALE, _TINY, 224),
    "featscale_swin_small_patch4_window7_224": (_FEATSCALE, _SMALL, 224),
    "featscale_swin_base_patch4_window7_224": (_FEATSCALE, _BASE, 224),
    "attnfeatscale_swin_tiny_patch4_window7_224": (_BOTH, _TINY, 224),
    "attnfeatscale_swin_small_patch4_window7_224": (_BOTH, _SMALL, 224),
    "attnfeatscale_swin_base_patch4_window7_224": (_BOTH, _BASE, 224),
}

_PAPER = ("arXiv:2103.14030", "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows")
# The centre 224 of an image resized to 256, as in the code of both papers; timm's Swin keeps 0.9.
default_cfgs = data_configs(_VARIANTS, 224 / 256, _PAPER, pool_size=(7, 7), classifier="head.fc")
register_variants(
    __name__, _VARIANTS, Swin, checkpoint_filter_fn, dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
)
