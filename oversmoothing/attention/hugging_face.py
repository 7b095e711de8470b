"""Vision transformers of Hugging Face transformers, an optional dependency: imported only for a model of that library.

Since version 5 its attention classes share one form: separate projections, then a function that the configuration
names ("sdpa", "eager", ...), then the output projection. Forward returns the output, and the maps or None.
"""

import sys
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from .heads import Heads
from .kinds import KINDS, Kind, linear_weights, split_heads

# Attention class -> module of transformers.models
CLASSES = {
    "ViTAttention": "vit",
    "DeiTAttention": "deit",
    "Dinov2Attention": "dinov2",
    "Dinov2WithRegistersAttention": "dinov2_with_registers",
    "DINOv3ViTAttention": "dinov3_vit",
    "SiglipAttention": "siglip",
    "CLIPAttention": "clip",
    "BeitAttention": "beit",
}


def register(cls: type[nn.Module]) -> None:
    """Registers the kind of ``cls`` if it is one of these attention classes."""
    family = CLASSES.get(cls.__name__)
    if family is not None and cls.__module__ == f"transformers.models.{family}.modeling_{family}":
        KINDS[cls] = HuggingFaceKind()


def makes_maps(attn: nn.Module) -> bool:
    """Whether the configuration asks for maps as tensors ("eager")."""
    return attn.config._attn_implementation in (None, "eager")


class HuggingFaceHeads(Heads):
    """Attention by the function that the configuration names; ``context`` holds the module and further arguments."""

    def apply(self, values: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, H, N, D)."""
        if not self.fused:
            return super().apply(values)
        attn, kwargs = self.context
        function = ALL_ATTENTION_FUNCTIONS[attn.config._attn_implementation]
        scaling, dropout = self.scale, self.dropout
        y, _ = function(attn, self.q, self.k, values, self.bias, scaling=scaling, dropout=dropout, **kwargs)
        return y.transpose(1, 2)

    def softmax_maps(self) -> Tensor:
        """(B, H, N, N); with "eager" in the configuration, by the family's own function, softmax in float32."""
        attn, _ = self.context
        if not makes_maps(attn):
            return super().softmax_maps()
        family = next(cls.__module__ for cls in type(attn).__mro__ if cls.__module__.startswith("transformers.models."))
        make = sys.modules[family].eager_attention_forward
        return make(attn, self.q, self.k, self.v, self.bias, scaling=self.scale, dropout=0.0)[1]


class HuggingFaceKind(Kind):
    """ViT, DeiT, DINOv2, DINOv3, SigLIP, CLIP and BEiT of transformers."""

    def objection(self, attn: nn.Module) -> str | None:
        """Text encoders of CLIP and SigLIP have the same class."""
        return "it belongs to a text encoder" if type(attn.config).__name__.endswith("TextConfig") else None

    def split(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Heads:
        """hidden_states: (B, N, C); attention_mask: broadcastable to (B, H, N, N); position_embeddings: of DINOv3."""
        q, k, v = (
            split_heads(proj(hidden_states), self.num_heads(attn)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        if position_embeddings is not None:
            q, k = dinov3.apply_rotary_pos_emb(q, k, *position_embeddings)
        return HuggingFaceHeads(
            hidden_states,
            q,
            k,
            v,
            _first(attn, "scaling", "scale"),
            attention_mask,
            attention_mask is None and kwargs.get("is_causal", attn.is_causal),
            _first(attn, "attention_dropout", "dropout") if attn.training else 0.0,
            not makes_maps(attn),
            attention_mask,
            (attn, kwargs),
        )

    def merge(self, attn: nn.Module, y: Tensor, heads: Heads) -> tuple[Tensor, Tensor | None]:
        """(B, H, N, D) -> (B, N, C), and the softmax maps where the configuration asks for them ("eager")."""
        maps = heads.maps() if makes_maps(attn) else None
        return self.projection(attn)(self.unprojected(attn, y, heads)), maps

    def num_heads(self, attn: nn.Module) -> int:
        """H."""
        return _first(attn, "num_heads", "num_attention_heads")

    def value_weights(self, attn: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Values have a projection of their own."""
        return linear_weights(attn.v_proj, self.projection(attn))

    def projection(self, attn: nn.Module) -> nn.Module:
        """The output projection."""
        return _first(attn, "o_proj", "out_proj")


def _first(module: nn.Module, *names: str) -> Any:
    """The attribute with one of these names, which differ between the families."""
    return next(getattr(module, name) for name in names if hasattr(module, name))
