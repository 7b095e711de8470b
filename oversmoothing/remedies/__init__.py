"""Remedies against over-smoothing, one a file; importing this package registers all of them.

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
    register_remedy,
    uniform_map,
)
from .featscale import FeatScaleBlock, FeatScaleLayerScaleBlock

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "REMEDIES",
    "REMEDY_PARAMETERS",
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

# Parameters and modules that some remedy adds, by the last part of their names; they are unique.
REMEDY_PARAMETERS = frozenset(
    name for remedy in REMEDIES.values() for name in remedy().new_state(LayerShape(0, dim=1, num_heads=1, head_dim=1))
)


def is_remedy_parameter(name: str) -> bool:
    """Whether a parameter's full name (``blocks.3.attn.lamb``) is one that a remedy adds to its baseline."""
    return not REMEDY_PARAMETERS.isdisjoint(name.split("."))
