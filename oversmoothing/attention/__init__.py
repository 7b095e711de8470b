"""What one attention layer computes, for every attention class at hand: its heads, its maps, what follows them."""

from . import cait, refusals, vit, windows
from .heads import Heads, counted_tokens
from .kinds import (
    KINDS,
    REFUSALS,
    Kind,
    UnsupportedAttentionError,
    find_kind,
    kind_of,
    merge_heads,
    refuse,
    register_kind,
    split_heads,
)

__all__ = [
    "KINDS",
    "REFUSALS",
    "Heads",
    "Kind",
    "UnsupportedAttentionError",
    "cait",
    "counted_tokens",
    "find_kind",
    "kind_of",
    "merge_heads",
    "refusals",
    "refuse",
    "register_kind",
    "split_heads",
    "vit",
    "windows",
]
