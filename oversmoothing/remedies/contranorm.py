"""ContraNorm: tokens are moved apart before every norm."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models import eva, naflexvit, swin_transformer_v2, swin_transformer_v2_cr, vision_transformer
from torch import Tensor, nn

from ..fused.contranorm import ContraMixing, can_mix
from .base import Layer, LayerShape, NormRemedy, RemedyError, register_remedy

POST_NORM = (
    vision_transformer.ResPostBlock,
    eva.EvaBlockPostNorm,
    swin_transformer_v2.SwinTransformerV2Block,
    swin_transformer_v2_cr.SwinTransformerV2CrBlock,
)


@register_remedy
@dataclass(frozen=True, kw_only=True)
class ContraNorm(NormRemedy):
    """``norm(x - s z)`` with ``z = softmax(n n^T / tau) x`` and ``n`` the tokens with L2 norm 1.

    Options as in the authors' code: ``dual`` adds the softmax over columns, ``pre`` uses ``n`` in place of ``x``,
    ``identity`` uses ``(1 + s) x`` instead of ``x``, ``learnable`` makes ``s`` a vector over the channels, ``positive``
    makes ``s`` the exponential of that vector. With ``learnable`` and ``identity`` their code computes ``s x - s z``,
    without the 1, and so does this. It changes every norm: both of a block and the model's last one. The class token
    takes part. The paper writes ``softmax(x x^T)``; the code normalises the rows. The paper gives no ``s`` for its ViT
    tables; the authors' script has ``s = 0.01`` in a comment.
    """

    name = "contranorm"
    formula = "norm(x - s softmax(n n^T / tau) x), n = x / |x|"
    source = "arXiv 2303.06562, ICLR 2023"
    cost = "attention with one head of width C in each norm, without maps kept"
    published = dict(scale=0.01, learnable=False)

    scale: float = 0.0
    tau: float = 1.0
    learnable: bool = True
    positive: bool = False
    dual: bool = False
    pre: bool = False
    identity: bool = False

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise RemedyError(f"contranorm: tau={self.tau}: give a temperature above 0")
        if self.scale == 0 and (self.identity or self.positive) and self.learnable:
            raise RemedyError("contranorm: identity and positive need a scale above 0: at 0 they are no plain norm")

    def objection(self, model: nn.Module, layers: list[Layer]) -> str | None:
        """Refuses norms behind the branches, and norms over anything but the tokens of one image."""
        if isinstance(model, naflexvit.NaFlexVit):
            return "its batches hold padding, which would take part in the norm"
        if any(isinstance(layer.block, POST_NORM) for layer in layers):
            return "its norms follow the branches"
        if not all(layer.kind.channels_last and len(self.norms(model, layer, is_last=False)) == 2 for layer in layers):
            return "its blocks have no pair of norms over tokens with channels last"
        return None

    def new_state(self, layer: LayerShape) -> dict[str, Tensor | nn.Module]:
        """``contranorm_scale`` (C,), where learnable."""
        start = torch.full((layer.dim,), float(self.scale))
        return {"contranorm_scale": start.log() if self.positive else start} if self.learnable else {}

    def before_norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Fused by :class:`ContraMixing` or by one or two fused attention calls: no N x N similarities are kept."""
        s = norm.contranorm_scale.to(x.dtype) if self.learnable else x.new_full((x.shape[-1],), self.scale)
        s = s.exp() if self.positive and self.learnable else s
        if norm.fused_attn and can_mix(x, self.tau) and not (self.dual or self.pre or self.identity):
            return ContraMixing.apply(x, s, self.tau)
        n = F.normalize(x, dim=-1)
        x = n if self.pre else x
        z = self._mix(n, x) if norm.fused_attn else self.similarities(n) @ x
        if self.identity:
            return (s if self.learnable else 1 + s) * x - s * z
        return x - s * z

    def similarities(self, n: Tensor) -> Tensor:
        """The definition of the mixing matrix, (B, N, N)."""
        scores = n @ n.mT / self.tau
        return scores.softmax(dim=-1) + scores.softmax(dim=-2) if self.dual else scores.softmax(dim=-1)

    def _mix(self, n: Tensor, x: Tensor) -> Tensor:
        n, x = n.unsqueeze(1), x.unsqueeze(1)  # one head
        if not self.dual:
            return F.scaled_dot_product_attention(n, n, x, scale=1 / self.tau).squeeze(1)
        # One more key, zero, gets the weight w = 1 / (1 + D), which gives the row sums D of E = exp(n n^T / tau). E is
        # symmetric, so its column sums are D too. With S the softmax over rows, that over columns is E D^-1 = D S D^-1.
        queries, keys, values = F.pad(n, (0, 1)), F.pad(n, (0, 1, 0, 1)), F.pad(x, (0, 1, 0, 1))
        values[..., -1, -1] = 1
        padded = F.scaled_dot_product_attention(queries, keys, values, scale=1 / self.tau)
        w = padded[..., -1:]
        sums = 1 / w - 1
        columns = sums * F.scaled_dot_product_attention(n, n, x / sums, scale=1 / self.tau)
        return (padded[..., :-1] / (1 - w) + columns).squeeze(1)
