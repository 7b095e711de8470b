"""Remedies against over-smoothing, one per file; importing this package registers all of them.

A new remedy is one new file here with a class under ``@register_remedy``: ``add_remedy``, the flags, the analysis and
the benchmark find it by its name. See ``docs/add_a_remedy.md``.
"""

import importlib
import pkgutil

from .attnscale import AttnScaleAttention, AttnScaleTalkingHeadAttn
from .base import (
    REMEDIES,
    AttentionRemedy,
    BranchRemedy,
    Layer,
    LayerShape,
    NormRemedy,
    Operator,
    Remedy,
    RemedyError,
    attend,
    is_remedy_parameter,
    register_remedy,
    uniform_map,
)
from .featscale import FeatScaleBlock, FeatScaleLayerScaleBlock

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "REMEDIES",
    "AttentionRemedy",
    "AttnScaleAttention",
    "AttnScaleTalkingHeadAttn",
    "BranchRemedy",
    "FeatScaleBlock",
    "FeatScaleLayerScaleBlock",
    "Layer",
    "LayerShape",
    "NormRemedy",
    "Operator",
    "Remedy",
    "RemedyError",
    "attend",
    "is_remedy_parameter",
    "register_remedy",
    "uniform_map",
]
