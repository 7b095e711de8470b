"""timm's transformer block and ``Mlp``, with less work for the host: only the layers that do something are called."""

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .folding import call, is_watched


class FoldedBlock(Block):
    """timm's ``Block``, see ``add_branches``. Fits the ``block_fn`` slot of timm's ``VisionTransformer``."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C); ``attn_mask`` and ``is_causal`` go to the attention layer."""
        y = self.attention_branch(self.norm1(x), attn_mask, is_causal)
        if torch.jit.is_scripting():
            x = x + self.drop_path1(self.ls1(y))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return add_branches(self, x, y)

    def attention_branch(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normed tokens (B, N, C) -> attention, (B, N, C)."""
        return self.attn(x, attn_mask=attn_mask, is_causal=is_causal)


def add_branches(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """The rest of a block: adds its attention branch to its input, and then the MLP.

    Identities, and dropout that is off, are not called; see ``folding.call``.

    Args:
        block: timm's ``Block``.
        x: Its input, shape (B, N, C).
        y: What its attention layer returns, shape (B, N, C).

    Returns:
        Shape (B, N, C).
    """
    x = x + call(block, "drop_path1", call(block, "ls1", y))
    return x + call(block, "drop_path2", call(block, "ls2", call_mlp(block.mlp, block.norm2(x))))


def call_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """``mlp(x)``, (B, N, C) -> (B, N, C); of timm's ``Mlp``, only the layers that do something are called.

    Where somebody would notice, ``mlp`` itself is called; compilers and exported graphs see it too.
    """
    if type(mlp) is not Mlp or is_watched(mlp, x) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return mlp(x)
    x = call(mlp, "norm", call(mlp, "drop1", mlp.act(mlp.fc1(x))))
    return call(mlp, "drop2", mlp.fc2(x))
