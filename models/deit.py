"""DeiT backbones: timm's ``VisionTransformer`` with DeiT's initialisation, plain and with the remedies."""
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from .attnscale import AttnScaleAttention
from .featscale import FeatScaleBlock
from .registry import register_variants

__all__ = ["DeiT"]  # registration adds the name of each variant


class DeiT(VisionTransformer):
    """timm's ``VisionTransformer`` whose class token starts as DeiT's does: trunc-normal 0.02 (timm 1.x: 1e-6)."""

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise every parameter; arguments as timm's."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)


def _build(name: str, pretrained: bool, **kwargs) -> DeiT:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        DeiT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"), **kwargs,
    )


_PLAIN: dict = {}
_ATTNSCALE = dict(attn_layer=AttnScaleAttention)
_FEATSCALE = dict(block_fn=FeatScaleBlock)
_BOTH = _ATTNSCALE | _FEATSCALE

_TINY_12 = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
_TINY_24 = dict(patch_size=16, embed_dim=192, depth=24, num_heads=3)
_SMALL_12 = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
_SMALL_24 = dict(patch_size=16, embed_dim=384, depth=24, num_heads=6)
_BASE_12 = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
_BASE_24 = dict(patch_size=16, embed_dim=768, depth=24, num_heads=12)

_VARIANTS = {
    "deit_tiny_12": (_PLAIN, _TINY_12),
    "deit_tiny_24": (_PLAIN, _TINY_24),
    "deit_small_12": (_PLAIN, _SMALL_12),
    "deit_small_24": (_PLAIN, _SMALL_24),
    "deit_base_12": (_PLAIN, _BASE_12),
    "deit_base_24": (_PLAIN, _BASE_24),
    "attnscale_tiny_12": (_ATTNSCALE, _TINY_12),
    "attnscale_tiny_24": (_ATTNSCALE, _TINY_24),
    "attnscale_small_12": (_ATTNSCALE, _SMALL_12),
    "attnscale_small_24": (_ATTNSCALE, _SMALL_24),
    "attnscale_base_12": (_ATTNSCALE, _BASE_12),
    "attnscale_base_24": (_ATTNSCALE, _BASE_24),
    "featscale_tiny_12": (_FEATSCALE, _TINY_12),
    "featscale_tiny_24": (_FEATSCALE, _TINY_24),
    "featscale_small_12": (_FEATSCALE, _SMALL_12),
    "featscale_small_24": (_FEATSCALE, _SMALL_24),
    "featscale_base_12": (_FEATSCALE, _BASE_12),
    "featscale_base_24": (_FEATSCALE, _BASE_24),
    "attnfeatscale_tiny_12": (_BOTH, _TINY_12),
    "attnfeatscale_tiny_24": (_BOTH, _TINY_24),
    "attnfeatscale_small_12": (_BOTH, _SMALL_12),
    "attnfeatscale_small_24": (_BOTH, _SMALL_24),
    "attnfeatscale_base_12": (_BOTH, _BASE_12),
    "attnfeatscale_base_24": (_BOTH, _BASE_24),
}


def _cfg(**kwargs) -> dict:
    # crop_pct: DeiT evaluates on the centre 224 of an image resized to 256.
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=None, crop_pct=224 / 256, interpolation="bicubic",
        fixed_input_size=True, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj", classifier="head", license="mit",
    ) | kwargs


default_cfgs = generate_default_cfgs({name: _cfg() for name in _VARIANTS})
register_variants(__name__, _VARIANTS, _build)
