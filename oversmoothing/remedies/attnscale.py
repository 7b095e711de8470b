"""AttnScale: amplify the high-pass part of each attention map.

A softmax attention map ``A`` (N, N) is a low-pass filter: its DC part is ``A_d = 1 1^T / N``, the map that replaces
every token by the mean token. AttnScale adds a learnable gain per head, ``lamb`` of shape (num_heads,), zero at the
start::

    A_hat = A_d + (1 + lamb) (A - A_d)                        (arXiv 2203.05962, AttnScale)

``A_d`` is constant, so ``A_hat V = (1 + lamb) A V - lamb mean(V)``: no N x N tensor is needed and any fused attention
can compute ``A V``. ``attn_scale`` is the dense definition, the reference of the tests and of the analysis; the
modules below use the closed form wherever it is exact.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.cait import TalkingHeadAttn
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from ..attention import Heads, register_kind
from ..attention.cait import TalkingHeadsKind
from ..attention.vit import PlainKind
from ..attention.windows import SwinKind
from ..fused.folding import Foldable, FoldedAttention, Gains, foldable_projection, shared_fold
from ..fused.talking_heads import FusedTalkingHeadAttn
from ..fused.windows import FoldedWindowAttention
from .base import AttentionRemedy, Operator, register_remedy, uniform_map


def attn_scale(attn: Tensor, lamb: Tensor) -> Tensor:
    """The definition: attention maps with their high-pass part scaled by ``1 + lamb``.

    Args:
        attn: Attention maps of shape (B, num_heads, N, N), after the softmax (on CaiT: after the head mixing too).
        lamb: Shape (num_heads,), dimensionless; zero leaves ``attn`` as it is.

    Returns:
        Shape (B, num_heads, N, N), the dtype of ``attn``.
    """
    mean_attn = 1.0 / attn.shape[-1]
    return attn + lamb.to(attn.dtype)[:, None, None] * (attn - mean_attn)


class AttnScaleAttention(FoldedAttention):
    """timm's ``Attention`` with AttnScale; fits the ``attn_layer`` slot of any timm ``VisionTransformer``.

    N counts every token of the sequence: class, distillation and register tokens included. With an attention mask the
    same identity holds, since the rows of a masked softmax still sum to one. Dropout on the attention weights acts on
    the entries of ``A_hat``, so it needs the dense form; ``fused_attn = False`` uses the dense form too.

    Args:
        dim: Channels C of the tokens.
        num_heads: Number of heads, and the length of ``lamb``.
        *args: As timm's ``Attention``.
        **kwargs: As timm's ``Attention``.
    """

    def __init__(self, dim: int, num_heads: int = 8, *args, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        self.lamb = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Sets ``lamb`` to zero: AttnScale is the identity (timm calls this for models built on the meta device)."""
        nn.init.zeros_(self.lamb)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, folded: bool
    ) -> Tensor:
        """``A_hat V``, or only ``A V`` if the projection does the rest; shapes as in ``FoldedAttention``."""
        if not self.fused_attn or (self.training and self.attn_drop.p > 0):
            return self.attn_drop(attn_scale(self.maps(q, k, attn_mask, is_causal), self.lamb)) @ v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return y if folded else y + self.lamb.to(y.dtype)[:, None, None] * (y - v.mean(dim=-2, keepdim=True))

    @torch.jit.unused
    def foldable(self) -> Foldable | None:
        """The projection with AttnScale in it; None with a norm or gate between them, or with dropout on the maps."""
        plain = foldable_projection(self)
        if plain is None or self.gate is not None or type(self.norm) is not nn.Identity:
            return None
        if self.training and self.attn_drop.p > 0:
            return None
        return Foldable(projection_gains, (), plain.weight, plain.bias, (self.lamb,), self.num_heads)

    def means(self, v: Tensor) -> Tensor:
        """The mean of the values, (B, num_heads * head_dim)."""
        return v.mean(dim=-2).flatten(1)


def projection_gains(lamb: Tensor) -> Gains:
    """``proj((1 + lamb) A V - lamb mean(V))``: scaled input columns of ``proj``, head by head, and a vector per image.

    Args:
        lamb: Shape (num_heads,), or (L, num_heads) for L layers.

    Returns:
        Gains for ``A V`` and for the mean of ``V``, both with the heads concatenated.
    """
    lamb = lamb.unsqueeze(-2)
    return Gains(1 + lamb, (-lamb,))


class AttnScaleTalkingHeadAttn(FusedTalkingHeadAttn):
    """CaiT's talking-heads attention with AttnScale; fits the ``attn_block`` slot of timm's ``Cait``.

    The remedy acts on the maps after the second head mixing, ``proj_w``. N counts the patch tokens (CaiT's class token
    joins later). Arguments as timm's ``TalkingHeadAttn``.
    """

    def __init__(self, dim: int, num_heads: int = 8, *args, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        self.lamb = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))

    def remedy(self, attn: Tensor) -> Tensor:
        """The definition, on maps of shape (B, num_heads, N, N)."""
        return attn_scale(attn, self.lamb)

    def second_mixing(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The mixing after the softmax with AttnScale in it, see ``mixing_gains``."""
        fold = shared_fold((self, num_tokens)) or self.foldable_mixing(num_tokens).make()
        return fold.weight, fold.bias

    @torch.jit.unused
    def foldable_mixing(self, num_tokens: int) -> Foldable:
        """What ``second_mixing`` is made of."""
        return Foldable(mixing_gains, (num_tokens,), self.proj_w.weight, self.proj_w.bias, (self.lamb,))


def mixing_gains(num_tokens: int, lamb: Tensor) -> Gains:
    """AttnScale is affine in the mixed maps: weight ``(1 + lamb) W``, bias ``(1 + lamb) b - lamb / N``.

    Args:
        num_tokens: N.
        lamb: Shape (num_heads,), or (L, num_heads) for L layers.
    """
    gain = 1 + lamb
    return Gains(gain.unsqueeze(-1), bias=gain, shift=lamb / -num_tokens)


class AttnScaleWindowAttention(FoldedWindowAttention):
    """Swin's window attention with AttnScale. N is the window's area.

    The mask of shifted windows is added before the softmax, so masked pairs get ``-lamb / N``, as in the paper's code.
    Arguments as timm's ``WindowAttention``.
    """

    def __init__(self, dim: int, num_heads: int, *args, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        self.lamb = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Start values of timm, and zero ``lamb`` (timm's constructor calls this before ``lamb`` exists)."""
        super().reset_parameters()
        if hasattr(self, "lamb"):
            nn.init.zeros_(self.lamb)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, folded: bool) -> Tensor:
        """``A_hat V``, or only ``A V`` if the projection does the rest; shapes as in ``FoldedWindowAttention``."""
        if not self.folds or (self.training and self.attn_drop.p > 0):
            return self.attn_drop(attn_scale(self.maps(q, k, mask), self.lamb)) @ v
        y = super().attend(q, k, v, mask, folded)
        return y if folded else y + self.lamb.to(y.dtype)[:, None, None] * (y - v.mean(dim=-2, keepdim=True))

    def foldable(self) -> Foldable | None:
        """The projection with AttnScale in it; see ``FoldedWindowAttention``."""
        plain = super().foldable()
        if plain is None:
            return None
        return plain._replace(gains=projection_gains, parameters=(self.lamb,), num_heads=self.num_heads)

    def means(self, v: Tensor) -> Tensor:
        """The mean of each window's values, (B * windows, H * D)."""
        return v.mean(dim=-2).flatten(1)


class _AttnScaleKind(PlainKind):
    def applied_maps(self, attn: AttnScaleAttention, heads: Heads) -> Tensor:
        return attn_scale(heads.maps(), attn.lamb)


class _AttnScaleWindowKind(SwinKind):
    def applied_maps(self, attn: AttnScaleWindowAttention, heads: Heads) -> Tensor:
        return attn_scale(heads.maps(), attn.lamb)


class _AttnScaleTalkingHeadsKind(TalkingHeadsKind):
    def applied_maps(self, attn: AttnScaleTalkingHeadAttn, heads: Heads) -> Tensor:
        return attn_scale(heads.maps(), attn.lamb)


register_kind(AttnScaleAttention)(_AttnScaleKind)
register_kind(AttnScaleTalkingHeadAttn)(_AttnScaleTalkingHeadsKind)
register_kind(AttnScaleWindowAttention)(_AttnScaleWindowKind)


@register_remedy
@dataclass(frozen=True, kw_only=True)
class AttnScale(AttentionRemedy):
    """``A_d + (1 + lamb)(A - A_d)`` with ``A_d = 1 1^T / N``; one ``lamb`` per head, starting at zero."""

    name = "attnscale"
    formula = "(1 + lamb) y - lamb m"
    source = "arXiv 2203.05962, ICLR 2022"
    cost = "one pass over the values; nothing where the projection does it"
    per_head = ("lamb",)
    prefix = ""
    square = False
    native = {
        Attention: AttnScaleAttention,
        FoldedAttention: AttnScaleAttention,
        TalkingHeadAttn: AttnScaleTalkingHeadAttn,
        FusedTalkingHeadAttn: AttnScaleTalkingHeadAttn,
        WindowAttention: AttnScaleWindowAttention,
        FoldedWindowAttention: AttnScaleWindowAttention,
    }

    lamb: float = 0.0

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """``(1 + lamb) apply(v) - lamb m``."""
        (lamb,) = self.weights(attn, heads.v)
        return lambda v: (1 + lamb) * apply(v) - lamb * heads.token_mean(v)

    def maps(self, attn: nn.Module, maps: Tensor, heads: Heads) -> Tensor:
        """The definition."""
        (lamb,) = self.weights(attn, maps)
        return maps + lamb * (maps - uniform_map(heads, maps))
