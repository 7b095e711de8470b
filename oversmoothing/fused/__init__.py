"""Fast paths that make remedies free: folding into the projection, and talking heads that keep no attention map."""

from .folding import FoldedAttention, set_fused
from .talking_heads import FusedTalkingHeadAttn

__all__ = ["FoldedAttention", "FusedTalkingHeadAttn", "set_fused"]
