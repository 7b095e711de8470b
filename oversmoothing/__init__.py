"""Over-smoothing in vision transformers: what it is, how to see it, and what to do about it.

analysis   what attention does to the features, layer by layer: numbers, figures, a report
attention  what one attention layer computes, for every supported attention class
convert    ``add_remedy``: adds remedies to any existing vision transformer
remedies   one remedy per file: equation, dense definition, fast form
fused      fast paths that make remedies free
weights    any checkpoint file, read safely and loaded with every key accounted for
zoo        DeiT, CaiT and Swin with the remedies, registered with timm (``models`` in a checkout of the repository)
"""

from .convert import add_remedy, describe, list_remedies, remedies_at, remedies_of, remedy_options, remove_remedy
from .fused import set_fused
from .hugging_face import from_pretrained
from .remedies import (
    AttnScaleAttention,
    AttnScaleTalkingHeadAttn,
    FeatScaleBlock,
    FeatScaleLayerScaleBlock,
    RemedyError,
    is_remedy_parameter,
)

__all__ = [
    "AttnScaleAttention",
    "AttnScaleTalkingHeadAttn",
    "FeatScaleBlock",
    "FeatScaleLayerScaleBlock",
    "RemedyError",
    "add_remedy",
    "describe",
    "from_pretrained",
    "is_remedy_parameter",
    "list_remedies",
    "remedies_at",
    "remedies_of",
    "remedy_options",
    "remove_remedy",
    "set_fused",
]
