"""AttnScale: amplify the high-pass part of each attention map.

A softmax attention map ``A`` (N, N) is a low-pass filter: its DC part is ``A_d = 1 1^T / N``, the map that replaces
every token by the mean token. AttnScale adds a learnable gain per head, ``lamb`` of shape (num_heads,), zero at the
start::

    A_hat = A_d + (1 + lamb) (A - A_d)                        (arXiv 2203.05962, AttnScale)

``A_d`` is constant, so ``A_hat V = A V + lamb (A V - mean(V))``: no N x N tensor is needed and any fused attention can
compute ``A V``. ``attn_scale`` is the dense definition, the oracle of the tests and of the analysis; the two modules
below use the closed form wherever it is exact.
"""
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.layers.attention import resolve_self_attn_mask
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn


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


class AttnScaleAttention(Attention):
    """timm's ``Attention`` with AttnScale; fits the ``attn_layer`` slot of any timm ``VisionTransformer``.

    N counts every token of the sequence: class, distillation and register tokens included. With an attention mask the
    same identity holds, since the rows of a masked softmax still sum to one. Dropout on the attention weights would
    fall on the entries of ``A_hat``, so it takes the dense form (as does ``fused_attn = False``).

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
        """Zero ``lamb``, where AttnScale is the identity (timm calls this for models built on the meta device)."""
        nn.init.zeros_(self.lamb)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C); ``attn_mask`` and ``is_causal`` as ``scaled_dot_product_attention`` takes them."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)

        if self.fused_attn and not (self.training and self.attn_drop.p > 0):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
            y = y + self.lamb.to(y.dtype)[:, None, None] * (y - v.mean(dim=-2, keepdim=True))
        else:
            attn = q * self.scale @ k.transpose(-2, -1)
            mask = resolve_self_attn_mask(N, attn, attn_mask, is_causal)
            attn = attn_scale((attn if mask is None else attn + mask).softmax(dim=-1), self.lamb)
            y = self.attn_drop(attn) @ v

        y = self.norm(y.transpose(1, 2).reshape(B, N, self.attn_dim))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


class AttnScaleTalkingHeadAttn(TalkingHeadAttn):
    """CaiT's talking-heads attention with AttnScale; fits the ``attn_block`` slot of timm's ``Cait``.

    The remedy acts on the maps after the second head mixing, ``proj_w``, and is affine in them, so it folds exactly
    into that mixing: weight ``(1 + lamb) W``, bias ``(1 + lamb) b - lamb / N``. N counts the patch tokens (CaiT's class
    token joins later). Arguments as timm's ``TalkingHeadAttn``.
    """

    def __init__(self, dim: int, num_heads: int = 8, *args, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        self.lamb = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        gain = 1 + self.lamb
        attn = mix_heads(q * self.scale @ k.transpose(-2, -1), self.proj_l.weight, self.proj_l.bias).softmax(dim=-1)
        attn = mix_heads(attn, gain[:, None] * self.proj_w.weight, gain * self.proj_w.bias - self.lamb / N)
        y = (self.attn_drop(attn) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(y))


def mix_heads(attn: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map over the heads: (B, num_heads, N, N) -> the same shape, without permuting the maps.

    Args:
        attn: Attention scores or maps of shape (B, num_heads, N, N).
        weight: Shape (num_heads, num_heads).
        bias: Shape (num_heads,).
    """
    return (weight @ attn.flatten(2) + bias.to(attn.dtype)[:, None]).view_as(attn)
