"""Over-smoothing in vision transformers: what it is, how to see it, and what to do about it.

attention  what one attention layer computes, for every class of timm's and transformers' models
analysis   what attention does to the features, layer by layer: numbers, figures, a report
remedies   one remedy a file: equation, dense definition, fast form
fused      what makes remedies free
weights    any checkpoint file, read safely and loaded with every key accounted for
zoo        DeiT and CaiT with the remedies, registered with timm (``models`` in a checkout of the repository)
"""

from .fused import set_fused
from .remedies import (
    AttnScaleAttention,
    AttnScaleTalkingHeadAttn,
    FeatScaleBlock,
    FeatScaleLayerScaleBlock,
    is_remedy_parameter,
)

__all__ = [
    "AttnScaleAttention",
    "AttnScaleTalkingHeadAttn",
    "FeatScaleBlock",
    "FeatScaleLayerScaleBlock",
    "is_remedy_parameter",
    "set_fused",
]
