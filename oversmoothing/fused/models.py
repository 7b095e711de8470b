"""timm's models, with the folds of all their layers made together: see ``folding.share_folds``."""

from collections.abc import Hashable, Iterator

from timm.models.cait import Cait
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, jit

from .folding import Foldable, foldables, share_folds
from .talking_heads import FusedTalkingHeadAttn


class FoldedVisionTransformer(VisionTransformer):
    """timm's ``VisionTransformer``; arguments as timm's."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, num_classes)."""
        if not jit.is_scripting():
            return self._forward_eagerly(x, attn_mask, is_causal)
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))

    @jit.unused
    def _forward_eagerly(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        with share_folds(() if self.grad_checkpointing else foldables(self.blocks), x):
            return self._forward_shared(x, attn_mask, is_causal)

    @jit.unused
    def _forward_shared(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))


class FoldedCait(Cait):
    """timm's ``Cait``; arguments as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, num_classes)."""
        if not jit.is_scripting():
            return self._forward_eagerly(x)
        return self.forward_head(self.forward_features(x))

    @jit.unused
    def _forward_eagerly(self, x: Tensor) -> Tensor:
        with share_folds(() if self.grad_checkpointing else self._foldables(), x):
            return self.forward_head(self.forward_features(x))

    def _foldables(self) -> Iterator[tuple[Hashable, Foldable]]:
        yield from foldables(self.blocks)
        num_tokens = self.patch_embed.num_patches
        for block in self.blocks:
            attn = block.attn
            if isinstance(attn, FusedTalkingHeadAttn) and attn.fused_attn:
                foldable = attn.foldable_mixing(num_tokens)
                if foldable is not None:
                    yield (attn, num_tokens), foldable
