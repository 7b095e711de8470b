"""Registers a table of model variants with timm: each row is a variant's name, remedy, size and resolution."""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from oversmoothing.fused.folding import set_fused

from . import published

# Identifier and title of the remedies' paper.
PAPER = ("arXiv:2203.05962", "Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis")
# Name -> constructor arguments of the remedy, constructor arguments of the size, side of the images in pixels.
Variants = dict[str, tuple[dict, dict, int]]


def data_configs(variants: Variants, crop_pct: float, paper: tuple[str, str], **more: Any) -> dict:
    """timm's ``default_cfgs`` of a backbone.

    Args:
        variants: The backbone's table.
        crop_pct: Share of the resized image that evaluation keeps; 224 / 256 on DeiT, 1 on CaiT.
        paper: Identifier and title of the backbone's paper; rows with a remedy list the remedies' paper before it.
        **more: Further entries of the backbone, for example another name of its ``classifier``.
    """
    common = dict(
        num_classes=1000,
        pool_size=None,
        crop_pct=crop_pct,
        interpolation="bicubic",
        fixed_input_size=True,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head",
        license="mit",
    )
    common |= more
    configs = {}
    for name, (remedy, _, pixels) in variants.items():
        ids, titles = zip(*([PAPER, paper] if remedy else [paper]), strict=True)
        papers = dict(paper_ids=ids, paper_name="; ".join(titles))
        configs[name] = common | dict(input_size=(3, pixels, pixels)) | papers | published.source(name)
    return generate_default_cfgs(configs)


def register_variants(
    module_name: str,
    variants: Variants,
    model_class: type[nn.Module],
    checkpoint_filter_fn: Callable,
    feature_cfg: Mapping[str, Any] = MappingProxyType(dict(out_indices=3, feature_cls="getter")),
) -> None:
    """Makes each row of ``variants`` a timm entry point, bound in the backbone's module under the variant's name.

    Args:
        module_name: ``__name__`` of the backbone's module; its ``default_cfgs`` must exist already.
        variants: The backbone's table.
        model_class: timm's model class, or one derived from it.
        checkpoint_filter_fn: timm's adapter of pre-trained state dicts to that class.
        feature_cfg: How timm's ``features_only`` extracts the features.
    """
    module = sys.modules[module_name]
    for name, (remedy, size, _) in variants.items():
        entry_point = _entry_point(name, {**remedy, **size}, model_class, checkpoint_filter_fn, feature_cfg)
        entry_point.__module__ = module_name
        setattr(module, name, register_model(entry_point))


def _entry_point(
    name: str,
    defaults: dict,
    model_class: type[nn.Module],
    checkpoint_filter_fn: Callable,
    feature_cfg: Mapping[str, Any],
) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, fused: bool | None = None, **kwargs) -> nn.Module:
        if pretrained:
            asked = (kwargs.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"))
            kwargs["pretrained_cfg_overlay"] = published.overlay_with_weights(name, *asked)
        model = build_model_with_cfg(
            model_class,
            name,
            pretrained,
            pretrained_filter_fn=published.strict(checkpoint_filter_fn),
            feature_cfg={**feature_cfg, "out_indices": kwargs.pop("out_indices", feature_cfg["out_indices"])},
            **{**defaults, **kwargs},
        )
        published.forget_state_dict(model)
        return model if fused is None else set_fused(model, fused)

    arguments = ", ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in defaults.items())
    entry_point.__name__ = entry_point.__qualname__ = name  # timm registers a function under its __name__
    entry_point.__doc__ = f"""{name}: timm's ``{model_class.__name__}`` with {arguments}.

    Args:
        pretrained: Load weights: {published.FILES.get(name, "none are published, name a source")}.
        fused: False switches every fast path off; see ``oversmoothing.set_fused``.
        **kwargs: timm's (``num_classes``, ``in_chans``, ``img_size``, ``features_only``, ``pretrained_cfg_overlay``,
            ``cache_dir``) and those of the model class.
    """
    return entry_point
