"""What a remedy is: an equation with its options, the parameters that it adds, and a fast and a dense form.

A remedy of the attention is an *operator transformer*. Attention is an operator on values, ``apply(v) = A v``; the
remedy takes this operator and returns another one, so remedies compose: each wraps the one before. ``Heads`` holds what
else a remedy needs (the layer's input, the mean token, the first layer's values); its parameters are on the attention
module. A remedy is a frozen dataclass: its fields are its options, and an instance holds no tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..attention import Heads, Kind, counted_tokens

Operator = Callable[[Tensor], Tensor]  # values (B, H, N, D) -> (B, H, Q, D)

REMEDIES: dict[str, type["Remedy"]] = {}
R = TypeVar("R", bound=type["Remedy"])


class RemedyError(ValueError):
    """A remedy cannot be added as asked; the message says which, to what, and why."""


def register_remedy(cls: R) -> R:
    """Class decorator: makes the remedy known to everything that takes one by name."""
    REMEDIES[cls.name] = cls
    return cls


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the layer that a remedy's parameters are for."""

    index: int  # among the model's self-attention layers
    dim: int  # C, channels of the tokens
    num_heads: int  # H
    head_dim: int  # D


@dataclass(frozen=True)
class Layer:
    """One self-attention layer of a model."""

    name: str  # of ``attn`` in the model, for example "blocks.3.attn"
    attn: nn.Module
    block: nn.Module  # the module that holds ``attn``
    kind: Kind
    shape: LayerShape


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Base of all remedies. Subclass one of the three classes below."""

    name: ClassVar[str]
    formula: ClassVar[str]  # with y = A v, m the mean token of v, v0 the first layer's values, x the layer's input
    source: ClassVar[str]
    cost: ClassVar[str]
    changes: ClassVar[str]  # "attention", "branch" or "norm"
    published: ClassVar[dict[str, Any]] = {}  # the options of the authors' method
    native: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {}  # module class -> class with the remedy built in

    def for_model(self, model: nn.Module) -> "Remedy":
        """The remedy, with the options that depend on the model filled in."""
        return self

    def objection(self, model: nn.Module, layers: list[Layer]) -> str | None:
        """Why the remedy has no meaning in these layers of a model; None if it fits."""
        return None

    def native_attributes(self) -> dict[str, Any]:
        """Attributes that a class of ``native`` needs besides the parameters."""
        return {}

    def new_state(self, layer: LayerShape) -> dict[str, Tensor | nn.Module]:
        """What the remedy adds to one module, by name: start values of parameters, or whole modules."""
        return {}


def state_on_meta(cls: type[Remedy], layer: LayerShape) -> dict[str, Tensor | nn.Module]:
    """What a remedy adds at its default options: names and shapes, without numbers."""
    with torch.device("meta"):
        return cls().new_state(layer)


@cache
def _state_names(cls: type[Remedy]) -> frozenset[str]:
    return frozenset(state_on_meta(cls, LayerShape(0, dim=1, num_heads=1, head_dim=1)))


def is_remedy_parameter(name: str) -> bool:
    """Whether a parameter with this full name (``blocks.3.attn.lamb``) belongs to a remedy."""
    parts = name.split(".")
    return not all(_state_names(cls).isdisjoint(parts) for cls in REMEDIES.values())


@dataclass(frozen=True, kw_only=True)
class AttentionRemedy(Remedy):
    """A remedy between the softmax and the output projection of a layer."""

    changes: ClassVar[str] = "attention"
    per_head: ClassVar[tuple[str, ...]] = ()  # options that are start values of learnable weights, one per head
    prefix: ClassVar[str | None] = None  # of the parameters' names; None: the remedy's name and "_"
    needs_first_values: ClassVar[bool] = False  # reads ``heads.first_v``; the first layer stays plain
    needs_maps: ClassVar[bool] = False  # there is no fast form
    square: ClassVar[bool] = True  # combines values with outputs token by token, so queries must not be pooled
    drops_softmax: ClassVar[bool] = False  # attention dropout falls on the softmax maps, not on ``maps(...)``

    learnable: bool = True

    def parameter_name(self, option: str) -> str:
        """Name of an option's parameter on the attention module."""
        return (f"{self.name}_" if self.prefix is None else self.prefix) + option

    def new_state(self, layer: LayerShape) -> dict[str, Tensor | nn.Module]:
        """One number per head for each of ``per_head``."""
        options = self.per_head if self.learnable else ()
        return {self.parameter_name(o): torch.full((layer.num_heads,), float(getattr(self, o))) for o in options}

    def weights(self, attn: nn.Module, like: Tensor) -> list[Tensor | float]:
        """The options of ``per_head``: parameters of shape (H, 1, 1), or plain numbers where they are not learnable."""
        if not self.learnable:
            return [getattr(self, option) for option in self.per_head]
        return [getattr(attn, self.parameter_name(o)).to(like.dtype)[:, None, None] for o in self.per_head]

    def wrap(self, attn: nn.Module, apply: Operator, heads: Heads) -> Operator:
        """The fast form: an operator made of ``apply``, without maps as tensors.

        Args:
            attn: The attention module, which has the parameters.
            apply: The operator so far.
            heads: This forward pass of the layer; ``heads.first_v`` are the first layer's values.
        """
        raise NotImplementedError

    def maps(self, attn: nn.Module, maps: Tensor, heads: Heads) -> Tensor:
        """The dense form, for remedies whose operator is a map: maps (B, H, Q, N) -> the maps that replace them.

        Used by the analysis, wherever dropout falls on the maps, and by the tests as the definition of ``wrap``.
        """
        raise NotImplementedError

    def objection(self, model: nn.Module, layers: list[Layer]) -> str | None:
        """Where queries are pooled, and where the layers' values do not match."""
        if self.square and not all(layer.kind.is_square(layer.attn) for layer in layers):
            return "queries and keys of some of its layers are not the same tokens, and the remedy combines the two"
        if self.needs_first_values:
            if any(layer.kind.windowed for layer in layers):
                return "its layers see windows, so the first layer's values belong to other tokens"
            if len({type(layer.attn) for layer in layers}) > 1:
                return "its layers are of several classes, which may see different tokens"
            if len({(layer.shape.num_heads, layer.shape.head_dim) for layer in layers}) > 1:
                return "the first layer's values have other sizes than those of later layers"
        return None

    @classmethod
    def has_maps(cls) -> bool:
        """Whether there is a dense form."""
        return cls.maps is not AttentionRemedy.maps


@dataclass(frozen=True, kw_only=True)
class BranchRemedy(Remedy):
    """A remedy on the output of the attention branch, after the projection; its parameters are on the block."""

    changes: ClassVar[str] = "branch"

    def branch(self, block: nn.Module, y: Tensor, token_mean: Operator) -> Tensor:
        """Output of the attention module (B, N, C) -> the same shape.

        Args:
            block: The module that has the parameters.
            y: The branch.
            token_mean: (B, N, C) -> (B, 1, C), the mean over the tokens that are not padding.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NormRemedy(Remedy):
    """A remedy in front of the norms of a block, and of the model's last one; its parameters are on the norms."""

    changes: ClassVar[str] = "norm"

    def before_norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """What the norm gets instead of the tokens ``x`` (B, N, C)."""
        raise NotImplementedError

    def norms(self, model: nn.Module, layer: Layer, is_last: bool) -> list[nn.Module]:
        """Both norms of the layer's block and, behind the last block, the model's; empty where there are none."""
        parts = layer.name.split(".")
        parents = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1, -1, -1)]
        for first, second in BLOCK_NORMS:
            block = next((parent for parent in parents if hasattr(parent, first) and hasattr(parent, second)), None)
            if block is not None:
                outer = parents[parents.index(block) + 1 :] if is_last else []
                last = [getattr(parent, name) for parent in outer for name in LAST_NORMS if hasattr(parent, name)]
                return [norm for norm in (getattr(block, first), getattr(block, second), *last[:1]) if _fits(norm)]
        return []


# Names of norms in timm and in transformers.
BLOCK_NORMS = (("norm1", "norm2"), ("layernorm_before", "layernorm_after"), ("layer_norm1", "layer_norm2"))
LAST_NORMS = ("norm", "layernorm")


def _fits(norm: nn.Module) -> bool:
    channels_first = isinstance(norm, nn.GroupNorm) or type(norm).__name__.endswith("2d")
    return not channels_first and getattr(norm, "weight", None) is not None


def uniform_map(heads: Heads, like: Tensor) -> Tensor | float:
    """The dense form of ``heads.token_mean``, broadcastable to (B, H, Q, N): rows of 1 / N, and 0 for padding."""
    if heads.attn_mask is None:
        return 1.0 / like.shape[-1]
    counts = counted_tokens(heads.attn_mask).to(like.dtype).unsqueeze(-2)
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def attend(attn: nn.Module, remedies: tuple[AttentionRemedy, ...], heads: Heads) -> Tensor:
    """Attention with remedies, the first of them next to the softmax: -> (B, H, Q, D).

    Dense if the layer itself is not fused, if a remedy has no fast form, or if there is dropout on a remedy's maps.
    """
    on_maps = heads.dropout > 0 and any(remedy.has_maps() for remedy in remedies)
    dense = not heads.fused or on_maps or any(remedy.needs_maps for remedy in remedies)
    apply, maps = heads.apply, heads.maps() if dense else None
    dropped = False
    for remedy in remedies:
        if maps is not None and (remedy.drops_softmax or not remedy.has_maps()) and not dropped:
            maps, dropped = heads.drop(maps), True
        if maps is not None and remedy.has_maps():
            maps = remedy.maps(attn, maps, heads)
            continue
        if maps is not None:
            apply, maps = maps.__matmul__, None
        apply = remedy.wrap(attn, apply, heads)
    if maps is not None:
        return (maps if dropped else heads.drop(maps)) @ heads.v
    return apply(heads.v)
