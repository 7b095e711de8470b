"""DeiT backbones: timm's ``VisionTransformer`` with DeiT's initialisation, plain and with the remedies."""

from functools import partial

from timm.layers import DropPath, trunc_normal_, use_fused_attn
from timm.models import checkpoint
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import Tensor, fx, jit

from oversmoothing.converted import RemediedNorm
from oversmoothing.fused.blocks import FoldedBlock, add_branches
from oversmoothing.fused.folding import any_hooks
from oversmoothing.fused.models import FoldedVisionTransformer
from oversmoothing.remedies.attnscale import AttnScaleAttention
from oversmoothing.remedies.featscale import FeatScaleBlock

from .registry import data_configs, register_variants

__all__ = ["DeiT"]  # registration adds the name of each variant


class DeiT(FoldedVisionTransformer):
    """timm's ``VisionTransformer`` whose class token starts as DeiT's does: trunc-normal 0.02 (timm 1.x: 1e-6).

    Calling the model is faster than ``forward_head(forward_features(x))`` and gives the same: see ``first_tokens``.

    Args:
        *args: As timm's.
        attn_skip: ``s`` in ``s x + f(x)``, the skip connection of each attention branch, for studies: below 1, tokens
            become similar in earlier layers. Each block's input is multiplied by ``s``; the norm before attention
            cancels the factor, up to its epsilon.
        drop_path_rate: Rate of the last block; the rates rise linearly from 0 in the first block.
        uniform_drop_path: Give all blocks ``drop_path_rate``, as DeiT III does (arXiv 2204.07118).
        **kwargs: As timm's.
    """

    fused_attn: jit.Final[bool]

    def __init__(
        self, *args, attn_skip: float = 1.0, drop_path_rate: float = 0.0, uniform_drop_path: bool = False, **kwargs
    ) -> None:
        super().__init__(*args, drop_path_rate=drop_path_rate, **kwargs)
        self.fused_attn = use_fused_attn()
        if uniform_drop_path and drop_path_rate:
            for block in self.blocks:
                block.drop_path1, block.drop_path2 = DropPath(drop_path_rate), DropPath(drop_path_rate)
        if attn_skip != 1:
            for block in self.blocks:
                block.register_forward_pre_hook(partial(_scale_input, attn_skip))

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise every parameter; arguments as timm's."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    @jit.unused
    def _forward_shared(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if self._reads_prefix_only(x) and attn_mask is None and not is_causal:
            return self._forward_prefix(x)
        return super()._forward_shared(x, attn_mask, is_causal)

    @jit.unused
    def _reads_prefix_only(self, x: Tensor) -> bool:
        # A traced graph (fx) and hooks in the last block need the features of all tokens.
        last = self.blocks[-1]
        return (
            self.fused_attn
            and self.global_pool == "token"
            and len(self.blocks) > 1
            # a subclass may have another forward
            and (type(last) in (Block, FoldedBlock) or "first_tokens" in vars(type(last)))
            and not isinstance(x, fx.Proxy)
            and not isinstance(last.norm2, RemediedNorm)  # which mixes tokens
            and not isinstance(self.norm, RemediedNorm)
            and not any_hooks(last)
            and not any_hooks(self.norm)
        )

    @jit.unused
    def _forward_prefix(self, x: Tensor) -> Tensor:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        *blocks, last = self.blocks
        for block in blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        if self.grad_checkpointing:
            x = checkpoint(first_tokens, last, x, self.num_prefix_tokens)
        else:
            x = first_tokens(last, x, self.num_prefix_tokens)
        return self.forward_head(self.norm(x))


def _scale_input(scale: float, block: Block, args: tuple) -> tuple:
    return scale * args[0], *args[1:]


def first_tokens(block: Block, x: Tensor, num_tokens: int) -> Tensor:
    """``block(x)[:, :num_tokens]`` without computing the rest: (B, N, C) -> (B, num_tokens, C).

    A class-token classifier reads only these tokens of the last block. Queries, projection and MLP are computed for
    them alone, keys and values for all tokens (FeatScale's mean needs all queries too). Exact, in training too. Dropout
    draws for these tokens only: the same distribution, another random stream. A block or attention layer with a faster
    way has a method ``first_tokens`` for its attention branch; the block's comes first.
    """
    y = block.norm1(x)
    branch = getattr(block, "first_tokens", None) or getattr(block.attn, "first_tokens", None)
    y = block.attn(y)[:, :num_tokens] if branch is None else branch(y, num_tokens)
    return add_branches(block, x[:, :num_tokens], y)


_PLAIN: dict = {}
_ATTNSCALE = dict(attn_layer=AttnScaleAttention, block_fn=FoldedBlock)
_FEATSCALE = dict(block_fn=FeatScaleBlock)
_BOTH = _ATTNSCALE | _FEATSCALE

_TINY_12 = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
_TINY_24 = dict(patch_size=16, embed_dim=192, depth=24, num_heads=3)
_SMALL_12 = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
_SMALL_24 = dict(patch_size=16, embed_dim=384, depth=24, num_heads=6)
_BASE_12 = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
_BASE_24 = dict(patch_size=16, embed_dim=768, depth=24, num_heads=12)

_VARIANTS = {
    "deit_tiny_12": (_PLAIN, _TINY_12, 224),
    "deit_tiny_24": (_PLAIN, _TINY_24, 224),
    "deit_small_12": (_PLAIN, _SMALL_12, 224),
    "deit_small_24": (_PLAIN, _SMALL_24, 224),
    "deit_base_12": (_PLAIN, _BASE_12, 224),
    "deit_base_24": (_PLAIN, _BASE_24, 224),
    "attnscale_tiny_12": (_ATTNSCALE, _TINY_12, 224),
    "attnscale_tiny_24": (_ATTNSCALE, _TINY_24, 224),
    "attnscale_small_12": (_ATTNSCALE, _SMALL_12, 224),
    "attnscale_small_24": (_ATTNSCALE, _SMALL_24, 224),
    "attnscale_base_12": (_ATTNSCALE, _BASE_12, 224),
    "attnscale_base_24": (_ATTNSCALE, _BASE_24, 224),
    "featscale_tiny_12": (_FEATSCALE, _TINY_12, 224),
    "featscale_tiny_24": (_FEATSCALE, _TINY_24, 224),
    "featscale_small_12": (_FEATSCALE, _SMALL_12, 224),
    "featscale_small_24": (_FEATSCALE, _SMALL_24, 224),
    "featscale_base_12": (_FEATSCALE, _BASE_12, 224),
    "featscale_base_24": (_FEATSCALE, _BASE_24, 224),
    "attnfeatscale_tiny_12": (_BOTH, _TINY_12, 224),
    "attnfeatscale_tiny_24": (_BOTH, _TINY_24, 224),
    "attnfeatscale_small_12": (_BOTH, _SMALL_12, 224),
    "attnfeatscale_small_24": (_BOTH, _SMALL_24, 224),
    "attnfeatscale_base_12": (_BOTH, _BASE_12, 224),
    "attnfeatscale_base_24": (_BOTH, _BASE_24, 224),
}

_PAPER = ("arXiv:2012.12877", "Training data-efficient image transformers & distillation through attention")
default_cfgs = data_configs(_VARIANTS, 224 / 256, _PAPER)  # the centre 224 of an image resized to 256
register_variants(__name__, _VARIANTS, DeiT, checkpoint_filter_fn)
