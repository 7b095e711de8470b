"""Gated attention: a sigmoid gate on the heads' outputs, computed from the layer's input."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Heads, split_heads
from ..attention.windows import HieraKind, TwinsWindowKind
from .base import AttentionRemedy, Layer, LayerShape, Operator, RemedyError, register_remedy


@register_remedy
@dataclass(frozen=True, kw_only=True)
class Gated(AttentionRemedy):
    """``y * gain sigmoid(W x + b)`` with ``x`` the layer's input (after the norm); one gate per channel or per head.

    The authors have ``gain = 1`` and start ``W`` normal with ``std = 0.02``, so that every gate starts near one half.
    They interleave the gate's rows with those of the query projection; the gate has a bias if that projection has one.
    Here ``gain = 2`` and ``W`` starts at zero, which leaves the layer unchanged.
    """

    name = "gated"
    formula = "y * 2 sigmoid(W x + b)"
    source = "arXiv 2505.06708"
    cost = "one more projection, C x C, or C x H with elementwise=False"
    published = dict(gain=1.0, std=0.02)

    elementwise: bool = True
    gain: float = 2.0
    std: float = 0.0

    def __post_init__(self) -> None:
        if self.std < 0:
            raise RemedyError(f"gated: std={self.std}: give a standard deviation of at least 0")

    def objection(self, model: nn.Module, layers: list[Layer]) -> str | None:
        """Refuses layers whose input tokens do not correspond to the tokens of the heads."""
        if any(isinstance(layer.kind, HieraKind | TwinsWindowKind) or not layer.kind.channels_last for layer in layers):
            return "the tokens of its heads are not in the order of its input, from which the gate is computed"
        return super().objection(model, layers)

    def new_state(self, layer: LayerShape) -> dict[str, Tensor | nn.Module]:
        """``gated_weight`` (H D or H, C) and ``gated_bias``."""
        rows = layer.num_heads * (layer.head_dim if self.elementwise else 1)
        weight = torch.zeros(rows, layer.dim)
        return {"gated_weight": weight.normal_(std=self.std) if self.std else weight, "gated_bias": torch.zeros(rows)}

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """One application and one projection."""
        x = heads.x.reshape(len(heads.v), heads.v.shape[2], -1)  # windows as batches, maps as sequences
        gate = F.linear(x, attn.gated_weight, attn.gated_bias).sigmoid()
        gate = self.gain * split_heads(gate, heads.v.shape[1])
        return lambda v: apply(v) * gate
