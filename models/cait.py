"""CaiT backbones: timm's ``Cait``, plain and with the remedies in the slots of its patch self-attention blocks.

The class-attention blocks get no remedy. Names keep the capital letters of the CaiT checkpoints (``cait_S24_224``),
which also keeps them apart from timm's own (``cait_s24_224``).
"""

from timm.models.cait import checkpoint_filter_fn

from oversmoothing.fused.models import FoldedCait
from oversmoothing.remedies.attnscale import AttnScaleTalkingHeadAttn
from oversmoothing.remedies.featscale import FeatScaleLayerScaleBlock

from .registry import data_configs, register_variants

__all__ = ["CaiT"]  # registration adds the name of each variant


class CaiT(FoldedCait):
    """timm's ``Cait``; the folds of its patch self-attention blocks are made together, see ``folding.share_folds``."""


_PLAIN: dict = {}
_ATTNSCALE = dict(attn_block=AttnScaleTalkingHeadAttn)
_FEATSCALE = dict(block_layers=FeatScaleLayerScaleBlock)
_BOTH = _ATTNSCALE | _FEATSCALE

# init_values is LayerScale's start, smaller for deeper and wider models (arXiv 2103.17239, table of CaiT models).
_XXS24 = dict(patch_size=16, embed_dim=192, depth=24, num_heads=4, init_values=1e-5)
_XXS36 = dict(patch_size=16, embed_dim=192, depth=36, num_heads=4, init_values=1e-5)
_XS24 = dict(patch_size=16, embed_dim=288, depth=24, num_heads=6, init_values=1e-5)
_S24 = dict(patch_size=16, embed_dim=384, depth=24, num_heads=8, init_values=1e-5)
_S36 = dict(patch_size=16, embed_dim=384, depth=36, num_heads=8, init_values=1e-6)
_M36 = dict(patch_size=16, embed_dim=768, depth=36, num_heads=16, init_values=1e-6)
_M48 = dict(patch_size=16, embed_dim=768, depth=48, num_heads=16, init_values=1e-6)

_VARIANTS = {
    "cait_XXS24_224": (_PLAIN, _XXS24, 224),
    "cait_XXS24": (_PLAIN, _XXS24, 384),
    "cait_XXS36_224": (_PLAIN, _XXS36, 224),
    "cait_XXS36": (_PLAIN, _XXS36, 384),
    "cait_XS24": (_PLAIN, _XS24, 384),
    "cait_S24_224": (_PLAIN, _S24, 224),
    "cait_S24": (_PLAIN, _S24, 384),
    "cait_S36": (_PLAIN, _S36, 384),
    "cait_M36": (_PLAIN, _M36, 384),
    "cait_M48": (_PLAIN, _M48, 448),
    "attnscale_cait_XXS24_224": (_ATTNSCALE, _XXS24, 224),
    "attnscale_cait_XXS24": (_ATTNSCALE, _XXS24, 384),
    "attnscale_cait_XXS36_224": (_ATTNSCALE, _XXS36, 224),
    "attnscale_cait_XXS36": (_ATTNSCALE, _XXS36, 384),
    "attnscale_cait_XS24": (_ATTNSCALE, _XS24, 384),
    "attnscale_cait_S24_224": (_ATTNSCALE, _S24, 224),
    "attnscale_cait_S24": (_ATTNSCALE, _S24, 384),
    "attnscale_cait_S36": (_ATTNSCALE, _S36, 384),
    "attnscale_cait_M36": (_ATTNSCALE, _M36, 384),
    "attnscale_cait_M48": (_ATTNSCALE, _M48, 448),
    "featscale_cait_XXS24_224": (_FEATSCALE, _XXS24, 224),
    "featscale_cait_XXS24": (_FEATSCALE, _XXS24, 384),
    "featscale_cait_XXS36_224": (_FEATSCALE, _XXS36, 224),
    "featscale_cait_XXS36": (_FEATSCALE, _XXS36, 384),
    "featscale_cait_XS24": (_FEATSCALE, _XS24, 384),
    "featscale_cait_S24_224": (_FEATSCALE, _S24, 224),
    "featscale_cait_S24": (_FEATSCALE, _S24, 384),
    "featscale_cait_S36": (_FEATSCALE, _S36, 384),
    "featscale_cait_M36": (_FEATSCALE, _M36, 384),
    "featscale_cait_M48": (_FEATSCALE, _M48, 448),
    "attnfeatscale_cait_XXS24_224": (_BOTH, _XXS24, 224),
    "attnfeatscale_cait_XXS24": (_BOTH, _XXS24, 384),
    "attnfeatscale_cait_XXS36_224": (_BOTH, _XXS36, 224),
    "attnfeatscale_cait_XXS36": (_BOTH, _XXS36, 384),
    "attnfeatscale_cait_XS24": (_BOTH, _XS24, 384),
    "attnfeatscale_cait_S24_224": (_BOTH, _S24, 224),
    "attnfeatscale_cait_S24": (_BOTH, _S24, 384),
    "attnfeatscale_cait_S36": (_BOTH, _S36, 384),
    "attnfeatscale_cait_M36": (_BOTH, _M36, 384),
    "attnfeatscale_cait_M48": (_BOTH, _M48, 448),
}

default_cfgs = data_configs(_VARIANTS, crop_pct=1.0, paper=("arXiv:2103.17239", "Going deeper with Image Transformers"))
register_variants(__name__, _VARIANTS, CaiT, checkpoint_filter_fn)
