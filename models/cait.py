"""CaiT backbones: timm's ``Cait``, plain and with the remedies in the slots of its patch self-attention blocks.

The class-attention blocks get no remedy. Names keep the capital letters of the CaiT checkpoints (``cait_S24_224``),
which also keeps them apart from timm's own (``cait_s24_224``). Without a resolution in its name a model takes 384 px
(M48: 448).
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.cait import Cait, checkpoint_filter_fn

from .attnscale import AttnScaleTalkingHeadAttn
from .featscale import FeatScaleLayerScaleBlock
from .folding import set_fused
from .registry import register_variants

__all__ = ["Cait"]  # registration adds the name of each variant


def _build(name: str, pretrained: bool, fused: bool | None = None, **kwargs) -> Cait:
    out_indices = kwargs.pop("out_indices", 3)
    model = build_model_with_cfg(
        Cait,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )
    return model if fused is None else set_fused(model, fused)


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
    "cait_XXS24_224": (_PLAIN, _XXS24),
    "cait_XXS24": (_PLAIN, _XXS24),
    "cait_XXS36_224": (_PLAIN, _XXS36),
    "cait_XXS36": (_PLAIN, _XXS36),
    "cait_XS24": (_PLAIN, _XS24),
    "cait_S24_224": (_PLAIN, _S24),
    "cait_S24": (_PLAIN, _S24),
    "cait_S36": (_PLAIN, _S36),
    "cait_M36": (_PLAIN, _M36),
    "cait_M48": (_PLAIN, _M48),
    "attnscale_cait_XXS24_224": (_ATTNSCALE, _XXS24),
    "attnscale_cait_XXS24": (_ATTNSCALE, _XXS24),
    "attnscale_cait_XXS36_224": (_ATTNSCALE, _XXS36),
    "attnscale_cait_XXS36": (_ATTNSCALE, _XXS36),
    "attnscale_cait_XS24": (_ATTNSCALE, _XS24),
    "attnscale_cait_S24_224": (_ATTNSCALE, _S24),
    "attnscale_cait_S24": (_ATTNSCALE, _S24),
    "attnscale_cait_S36": (_ATTNSCALE, _S36),
    "attnscale_cait_M36": (_ATTNSCALE, _M36),
    "attnscale_cait_M48": (_ATTNSCALE, _M48),
    "featscale_cait_XXS24_224": (_FEATSCALE, _XXS24),
    "featscale_cait_XXS24": (_FEATSCALE, _XXS24),
    "featscale_cait_XXS36_224": (_FEATSCALE, _XXS36),
    "featscale_cait_XXS36": (_FEATSCALE, _XXS36),
    "featscale_cait_XS24": (_FEATSCALE, _XS24),
    "featscale_cait_S24_224": (_FEATSCALE, _S24),
    "featscale_cait_S24": (_FEATSCALE, _S24),
    "featscale_cait_S36": (_FEATSCALE, _S36),
    "featscale_cait_M36": (_FEATSCALE, _M36),
    "featscale_cait_M48": (_FEATSCALE, _M48),
    "attnfeatscale_cait_XXS24_224": (_BOTH, _XXS24),
    "attnfeatscale_cait_XXS24": (_BOTH, _XXS24),
    "attnfeatscale_cait_XXS36_224": (_BOTH, _XXS36),
    "attnfeatscale_cait_XXS36": (_BOTH, _XXS36),
    "attnfeatscale_cait_XS24": (_BOTH, _XS24),
    "attnfeatscale_cait_S24_224": (_BOTH, _S24),
    "attnfeatscale_cait_S24": (_BOTH, _S24),
    "attnfeatscale_cait_S36": (_BOTH, _S36),
    "attnfeatscale_cait_M36": (_BOTH, _M36),
    "attnfeatscale_cait_M48": (_BOTH, _M48),
}


def _cfg(name: str) -> dict:
    size = 224 if name.endswith("_224") else 448 if name.endswith("_M48") else 384
    return dict(
        num_classes=1000,
        input_size=(3, size, size),
        pool_size=None,
        crop_pct=1.0,
        interpolation="bicubic",
        fixed_input_size=True,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head",
        license="mit",
    )


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in _VARIANTS})
register_variants(__name__, _VARIANTS, _build)
