"""What one attention layer computes, for every attention class at hand: its heads, its maps, what follows them."""

from . import vit
from .heads import Heads, counted_tokens
from .kinds import Kind, UnsupportedAttentionError, kind_of, merge_heads, refuse, register_kind, split_heads

__all__ = [
    "Heads",
    "Kind",
    "UnsupportedAttentionError",
    "counted_tokens",
    "kind_of",
    "merge_heads",
    "refuse",
    "register_kind",
    "split_heads",
    "vit",
]
