"""The remedies: one a file, with its equation, its definition on plain tensors and the layer that computes it fast."""

from .attnscale import AttnScaleAttention, AttnScaleTalkingHeadAttn
from .featscale import FeatScaleBlock, FeatScaleLayerScaleBlock

__all__ = [
    "REMEDY_PARAMETERS",
    "AttnScaleAttention",
    "AttnScaleTalkingHeadAttn",
    "FeatScaleBlock",
    "FeatScaleLayerScaleBlock",
    "is_remedy_parameter",
]

REMEDY_PARAMETERS = frozenset({"lamb", "lamb1", "lamb2"})


def is_remedy_parameter(name: str) -> bool:
    """Whether a parameter's full name (``blocks.3.attn.lamb``) is one that a remedy adds to its baseline."""
    return name.rsplit(".", 1)[-1] in REMEDY_PARAMETERS
