"""Tiny versions of the architectures that the library supports or refuses by name, with random weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from timm.models import davit, gcvit, metaformer, nest, pit, pvt_v2, tiny_vit, volo
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn


class Architecture(NamedTuple):
    """How to build one model."""

    make: str | Callable[..., nn.Module]  # a name for timm's create_model, or a class where the name fixes the size
    kwargs: dict[str, Any]
    image_size: int = 32


VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
SWIN = dict(img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
STAGES = dict(embed_dims=(16, 32, 32, 32), depths=(1, 1, 1, 1))
MAXVIT = dict(img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=16)
VOLO = dict(img_size=32, layers=(1, 2, 0, 0), embed_dims=(24, 48, 48, 48), num_heads=(2, 4, 4, 4), stem_hidden_dim=8)
EVA_GROUPED = dict(attn_type="rope", embed_dim=64, num_heads=4, num_kv_heads=2, qkv_fused=False)

# Every attention class that has a kind is in at least one of these, by a test.
ARCHITECTURES = {
    "vit": Architecture("vit_tiny_patch16_224", VIT),
    "vit_norms": Architecture("vit_tiny_patch16_224", VIT | dict(qk_norm=True, scale_attn_norm=True)),
    "vit_parallel": Architecture("vit_small_patch16_18x2_224", VIT),
    "deit": Architecture("deit_tiny_distilled_patch16_224", VIT),
    "deit3": Architecture("deit3_small_patch16_224", VIT),
    "dinov2_registers": Architecture("vit_small_patch14_reg4_dinov2", VIT),
    "siglip": Architecture("vit_base_patch16_siglip_224", VIT),
    "clip": Architecture("vit_base_patch16_clip_224", VIT),
    "naflexvit": Architecture("naflexvit_base_patch16_gap", VIT),
    "naflexvit_rotary": Architecture("naflexvit_base_patch16_gap", VIT | dict(rope_type="axial", attn_gated=True)),
    "eva": Architecture("eva_giant_patch14_224", VIT),
    "eva02": Architecture("eva02_tiny_patch14_224", VIT),
    "dinov3": Architecture("vit_small_patch16_dinov3", VIT),
    "dinov3_grouped": Architecture("vit_small_patch16_dinov3", VIT | EVA_GROUPED),
    "pe": Architecture("vit_pe_core_tiny_patch16_384", VIT),
    "beit": Architecture("beit_base_patch16_224", VIT),
    "beit_shared_bias": Architecture("beitv2_base_patch16_224", VIT | dict(use_shared_rel_pos_bias=True)),
    "relpos": Architecture("vit_relpos_small_patch16_224", VIT | dict(qk_norm=True)),
    "relpos_shared": Architecture("vit_srelpos_small_patch16_224", VIT | dict(rel_pos_dim=32)),
    "cait": Architecture("cait_xxs24_224", VIT),
    "swin": Architecture("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": Architecture("swinv2_tiny_window8_256", SWIN),
    "swinv2_cr": Architecture("swinv2_cr_tiny_224", SWIN),
    "volo": Architecture(volo.VOLO, VOLO | dict(outlook_attention=(True, False, False, False))),
    "hiera": Architecture("hiera_tiny_224", dict(img_size=(64, 64), embed_dim=16, stages=(1, 1, 2, 1)), 64),
    "maxvit": Architecture("maxvit_rmlp_pico_rw_256", MAXVIT, 64),
    "maxvit_tf": Architecture("maxvit_tiny_tf_224", MAXVIT, 64),
    "coatnet": Architecture("coatnet_pico_rw_224", MAXVIT | dict(block_type=("C", "T")), 64),
    "sam": Architecture(
        "samvit_base_patch16_224", VIT | dict(img_size=48, window_size=4, global_attn_indexes=(1,)), 48
    ),
    "sam2": Architecture(
        "sam2_hiera_tiny", dict(embed_dim=16, num_heads=1, stages=(1, 2, 2, 1), global_att_blocks=(4,)), 128
    ),
    "pit": Architecture(
        pit.PoolingVisionTransformer,
        dict(
            img_size=32, patch_size=8, stride=4, stem_type="", base_dims=(8, 8), depth=(1, 1), heads=(2, 4), mlp_ratio=2
        ),
    ),
    "tnt": Architecture("tnt_s_legacy_patch16_224", dict(img_size=32, depth=2, embed_dim=48, num_heads_outer=3)),
    "convit": Architecture("convit_tiny", VIT | dict(embed_dim=12, num_heads=4, local_up_to_layer=1)),
    "nest": Architecture(
        nest.Nest, dict(img_size=32, embed_dims=(24, 48), num_heads=(2, 2), depths=(1, 1), num_levels=2)
    ),
    "gcvit": Architecture(
        gcvit.GlobalContextVit,
        dict(img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_ratio=(4, 8)),
        64,
    ),
    "tiny_vit": Architecture(tiny_vit.TinyVit, STAGES | dict(num_heads=(1, 2, 2, 2), window_sizes=(4, 4, 4, 2)), 64),
    "twins": Architecture(
        "twins_svt_small", STAGES | dict(img_size=64, depths=(2, 2, 2, 2), wss=(3,) * 4, num_heads=(1, 2, 2, 2)), 64
    ),
    "pvt": Architecture(pvt_v2.PyramidVisionTransformerV2, STAGES, 64),
    "pvt_linear": Architecture(pvt_v2.PyramidVisionTransformerV2, STAGES | dict(linear=True), 64),
    "davit": Architecture(davit.DaVit, STAGES | dict(num_heads=(1, 2, 2, 2)), 64),
    "visformer": Architecture("visformer_tiny", dict(img_size=64, embed_dim=48, depth=(1, 1, 1), init_channels=8), 64),
    "caformer": Architecture(
        metaformer.MetaFormer,
        dict(
            dims=(16, 32),
            depths=(1, 2),
            token_mixers=(metaformer.SepConv, metaformer.Attention),
            norm_layers=(metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias),
        ),
    ),
    "fastvit": Architecture("fastvit_sa12", dict(embed_dims=(16, 32, 32, 32), layers=(1, 1, 1, 1)), 64),
}

# Models none of whose attention layers has a kind.
REFUSED = {
    "xcit": Architecture("xcit_nano_12_p16_224", VIT | dict(num_heads=3)),
    "vit_parallel_scaling": Architecture("vit_tiny_patch16_224", VIT | dict(block_fn=ParallelScalingBlock)),
}


def build(name: str, **kwargs: Any) -> nn.Module:
    """The tiny model in float64, with random weights of every kind: no LayerScale or bias near zero.

    Args:
        name: A key of :data:`ARCHITECTURES` or :data:`REFUSED`.
        **kwargs: As the model's own, on top of the table's.
    """
    make, size, _ = (ARCHITECTURES | REFUSED)[name]
    torch.manual_seed(0)
    size = size | dict(num_classes=10) | kwargs
    model = timm.create_model(make, **size) if isinstance(make, str) else make(**size)
    _enliven(model)
    return model.double().eval()


def _enliven(model: nn.Module) -> None:
    """No parameter all zero or all the same, and no LayerScale that hides its branch."""
    for parameter in model.parameters():
        if parameter.dim() < 2 or parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, parameter.detach().mean().item(), 0.1)


def images(name: str, batch: int = 2) -> Tensor:
    """A batch for the model of this name."""
    size = 32 if name in TRANSFORMERS else (ARCHITECTURES | REFUSED)[name].image_size
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


HUGGING_FACE = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8
)
# Model class and configuration class of transformers, and what its configuration has besides the sizes above.
TRANSFORMERS = {
    "hf_vit": ("ViTForImageClassification", "ViTConfig", {}),
    "hf_deit": ("DeiTForImageClassification", "DeiTConfig", {}),
    "hf_dinov2": ("Dinov2ForImageClassification", "Dinov2Config", dict(layerscale_value=1.0)),
    "hf_dinov2_registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        dict(layerscale_value=1.0),
    ),
    "hf_dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", dict(num_register_tokens=4, layerscale_value=1.0)),
    "hf_siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "hf_clip": ("CLIPVisionModel", "CLIPVisionConfig", {}),
    "hf_beit": ("BeitForImageClassification", "BeitConfig", dict(use_relative_position_bias=True)),
}


def build_transformers(name: str, **config: Any) -> nn.Module:
    """A tiny model of Hugging Face transformers in float64 with random weights.

    Args:
        name: A key of :data:`TRANSFORMERS`.
        **config: On top of the table's configuration.
    """
    import transformers

    model_class, config_class, extra = TRANSFORMERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**HUGGING_FACE | extra | config)
    model = getattr(transformers, model_class)(config)
    _enliven(model)
    return model.double().eval()
