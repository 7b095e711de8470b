"""Kinds of attention layers: how the forward of each attention class splits into ``Heads`` and what follows.

A *kind* knows one class, or several that compute the same. For an attention module ``attn`` with inputs ``x, ...``::

    kind = kind_of(attn)
    heads = kind.split(attn, x, ...)
    kind.merge(attn, heads.apply(heads.v), heads) == attn(x, ...)

Kinds hold no state: everything is read from the module's attributes at each call, so wrapped projections (LoRA),
resized windows and moved parameters work. For a class of your own::

    @register_kind(MyAttention)
    class MyKind(Kind):
        def split(self, attn, x): ...
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import Heads


class UnsupportedModelError(ValueError):
    """A model is not built as the library needs it; the message names the module and the reason."""


class UnsupportedAttentionError(UnsupportedModelError):
    """An attention layer has no kind; the message names its class and the reason."""


class Kind:
    """Base of all kinds; its own methods fit layers with channels last, ``proj`` and ``proj_drop``."""

    windowed = False  # B counts windows, which the layers of one model may cut differently
    channels_last = True  # input and output are (B, ..., C), tokens in the axes between; otherwise (B, C, H, W)
    block_channels_last = True  # the same for the block
    raster = True  # the block's tokens are in the order of the image's rows
    packed = False  # ``qkv`` makes all queries, then all keys, then all values, each head by head; ``proj`` takes heads
    stream: str | None = None  # the block's module that reads the residual sum, where that is not input + branch

    def objection(self, attn: nn.Module) -> str | None:
        """Why this module is not supported although its class has a kind; None where it is."""
        return None

    def split(self, attn: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Heads:
        """The layer up to its heads; takes the arguments of its forward."""
        raise NotImplementedError

    def merge(self, attn: nn.Module, y: Tensor, heads: Heads) -> Any:
        """The layer from its heads on: (B, H, Q, D) -> the output of its forward."""
        y = attn.proj(self.unprojected(attn, y, heads))
        return attn.proj_drop(y) if hasattr(attn, "proj_drop") else y

    def unprojected(self, attn: nn.Module, y: Tensor, heads: Heads) -> Tensor:
        """The input of the output projection: (B, H, Q, D) -> (B, ..., H * D)."""
        return merge_heads(y).reshape(*heads.x.shape[:-1], -1)

    def applied_maps(self, attn: nn.Module, heads: Heads) -> Tensor:
        """The maps that multiply the values in the layer's forward, (B, H, Q, N), with any built-in remedy."""
        return heads.maps()

    def num_heads(self, attn: nn.Module) -> int:
        """H."""
        return attn.num_heads

    def projection(self, attn: nn.Module) -> nn.Module:
        """The output projection, which takes (B, ..., H * D)."""
        return attn.proj

    def value_weights(self, attn: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Weights of the value and the output projection, where both are linear and nothing stands between them.

        Returns:
            ``W_V`` (H * D, C) and ``W_O`` (C, H * D), as ``nn.Linear`` holds them, head by head; None where the kind
            does not know them.
        """
        return linear_weights(attn.qkv, self.projection(attn), parts=3) if self.packed else None

    def window_grid(self, attn: nn.Module) -> tuple[int, int] | None:
        """Rows and columns of a window of neighbouring tokens, listed row by row; None for other kinds of windows."""
        return None

    def is_square(self, attn: nn.Module) -> bool:
        """Whether queries and keys are the same tokens, so that maps are square."""
        return True

    def branch(self, attn: nn.Module, block: nn.Module) -> tuple[nn.Module, str] | None:
        """The method that returns the attention branch's output for all tokens of an image, before LayerScale.

        Returns:
            A module and the name of its method; None where no method returns it.
        """
        return attn, "forward"


KINDS: dict[type[nn.Module], Kind] = {}
REFUSALS: dict[type[nn.Module], str] = {}


def register_kind(*types: type[nn.Module]) -> Callable[[type[Kind]], type[Kind]]:
    """Class decorator: registers the kind for exactly these types (a subclass may compute something else)."""

    def register(kind: type[Kind]) -> type[Kind]:
        KINDS.update(dict.fromkeys(types, kind()))
        return kind

    return register


def refuse(reason: str, *types: type[nn.Module]) -> None:
    """Registers why attention of these types has no kind; ``reason`` completes "is not supported: ..."."""
    REFUSALS.update(dict.fromkeys(types, reason))


def find_kind(module: nn.Module) -> Kind | None:
    """The kind of a module, None where it has none; registers classes of transformers when it meets them."""
    if type(module) not in KINDS and type(module).__module__.startswith("transformers."):
        from . import hugging_face

        hugging_face.register(type(module))
    kind = KINDS.get(type(module))
    return None if kind is None or kind.objection(module) else kind


def kind_of(module: nn.Module) -> Kind:
    """The kind of an attention module, by its exact type.

    Raises:
        UnsupportedAttentionError: If the type has none.
    """
    kind = find_kind(module)
    if kind is None:
        raise UnsupportedAttentionError(refusal(module))
    return kind


def refusal(module: nn.Module) -> str:
    """The sentence that says why a module's class has no kind."""
    reason = REFUSALS.get(type(module), "no kind is registered for it (oversmoothing.attention.register_kind)")
    if type(module) in KINDS:
        reason = KINDS[type(module)].objection(module)
    return f"attention of class {type(module).__module__}.{type(module).__name__} is not supported: {reason}."


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(y: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return y.transpose(1, 2).flatten(2)


def packed_projection(attn: nn.Module, x: Tensor) -> Tensor:
    """``attn.qkv(x)``, with the biases that BEiT and its descendants keep apart: (..., C) -> (..., 3 * H * D)."""
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)


def packed_heads(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one projection: (B, ..., C) -> three times (B, H, N, D)."""
    q, k, v = packed_projection(attn, x).flatten(1, -2).chunk(3, dim=-1)
    return split_heads(q, attn.num_heads), split_heads(k, attn.num_heads), split_heads(v, attn.num_heads)


def linear_weights(values: nn.Module, projection: nn.Module, parts: int = 1) -> tuple[Tensor, Tensor] | None:
    """The weights of two linear layers, of the first only the last of ``parts`` equal chunks of rows.

    None where either is another module, or where the shapes are not (H * D, C) and (C, H * D).
    """
    if not isinstance(values, nn.Linear) or not isinstance(projection, nn.Linear):
        return None
    v, o = values.weight.detach().chunk(parts)[-1], projection.weight.detach()
    return (v, o) if v.shape == o.T.shape else None


def dropout_of(attn: nn.Module) -> float:
    """Probability of dropout on the maps, in the module's present mode."""
    return attn.attn_drop.p if attn.training and hasattr(attn, "attn_drop") else 0.0
