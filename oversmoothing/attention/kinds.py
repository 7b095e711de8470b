"""Kinds of attention layers: how the forward of each attention class splits into ``Heads`` and what follows.

A *kind* knows one class, or several that compute the same. For an attention module ``attn`` with inputs ``x, ...``::

    kind = kind_of(attn)
    heads = kind.split(attn, x, ...)
    kind.merge(attn, heads.apply(heads.v), heads) == attn(x, ...)

Kinds hold no state: everything is read from the module's attributes at each call, so wrapped projections (LoRA), resized
windows and moved parameters are followed. For a class of your own::

    @register_kind(MyAttention)
    class MyKind(Kind):
        def split(self, attn, x): ...
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .heads import Heads


class UnsupportedAttentionError(ValueError):
    """An attention layer has no kind; the message names its class and the reason."""


class Kind:
    """Base of all kinds; ``merge`` here is right for layers with ``proj`` and ``proj_drop`` on (B, N, H * D)."""

    def split(self, attn: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Heads:
        """The layer up to its heads; arguments as those of its forward."""
        raise NotImplementedError

    def merge(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """The layer from its heads on: (B, H, Q, D) -> what its forward returns."""
        return attn.proj_drop(attn.proj(merge_heads(y)))


KINDS: dict[type[nn.Module], Kind] = {}
REFUSALS: dict[type[nn.Module], str] = {}


def register_kind(*types: type[nn.Module]) -> Callable[[type[Kind]], type[Kind]]:
    """Class decorator: the kind of modules of exactly these types (a subclass may compute something else)."""

    def register(kind: type[Kind]) -> type[Kind]:
        KINDS.update(dict.fromkeys(types, kind()))
        return kind

    return register


def refuse(reason: str, *types: type[nn.Module]) -> None:
    """Says why attention of these types has no kind; ``reason`` completes "it is not supported: ..."."""
    REFUSALS.update(dict.fromkeys(types, reason))


def kind_of(module: nn.Module) -> Kind:
    """The kind of an attention module, by its exact type.

    Raises:
        UnsupportedAttentionError: If the type has none.
    """
    kind = KINDS.get(type(module))
    if kind is None:
        name = f"{type(module).__module__}.{type(module).__name__}"
        reason = REFUSALS.get(type(module), "no kind is registered for this class; see attention.register_kind")
        raise UnsupportedAttentionError(f"attention of class {name} is not supported: {reason}")
    return kind


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(y: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return y.transpose(1, 2).flatten(2)
