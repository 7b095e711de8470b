"""What one attention layer computes, for every supported attention class: heads, maps and output."""

from . import cait, refusals, vit, windows
from .heads import Heads, counted_tokens
from .kinds import (
    KINDS,
    REFUSALS,
    Kind,
    UnsupportedAttentionError,
    UnsupportedModelError,
    find_kind,
    kind_of,
    merge_heads,
    refusal,
    refuse,
    register_kind,
    split_heads,
)
from .layers import AttentionLayer, attention_layers

__all__ = [
    "KINDS",
    "REFUSALS",
    "AttentionLayer",
    "Heads",
    "Kind",
    "UnsupportedAttentionError",
    "UnsupportedModelError",
    "attention_layers",
    "cait",
    "counted_tokens",
    "find_kind",
    "kind_of",
    "merge_heads",
    "refusal",
    "refusals",
    "refuse",
    "register_kind",
    "split_heads",
    "vit",
    "windows",
]
