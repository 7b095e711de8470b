"""Registers a table of model variants with timm, so that a variant is one row: its name, its remedy, its size."""

import sys
from collections.abc import Callable

from timm.models import register_model
from torch import nn


def register_variants(
    module_name: str, variants: dict[str, tuple[dict, dict]], build: Callable[..., nn.Module]
) -> None:
    """Makes one timm entry point a row of ``variants`` and binds it in the module under its name.

    Args:
        module_name: ``__name__`` of the backbone's module; its ``default_cfgs`` must exist already.
        variants: Model name -> (constructor arguments of the remedy, constructor arguments of the size).
        build: ``build(name, pretrained, **constructor_arguments)`` of the backbone.
    """
    module = sys.modules[module_name]
    for name, (remedy, size) in variants.items():
        setattr(module, name, register_model(_entry_point(module_name, name, {**remedy, **size}, build)))


def _entry_point(
    module_name: str, name: str, defaults: dict, build: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs) -> nn.Module:
        return build(name, pretrained, **{**defaults, **kwargs})

    entry_point.__name__ = entry_point.__qualname__ = name  # timm registers a function under its __name__
    entry_point.__module__ = module_name
    return entry_point
