"""The classes that converted modules get: subclasses of their own class, with remedies added."""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention import KINDS, Heads, Kind, kind_of
from .remedies import AttentionRemedy, BranchRemedy, LayerShape, Remedy, attend
from .remedies.first_values import FirstValues


@dataclass
class Conversion:
    """The record of a conversion, kept as the module's attribute ``conversion``."""

    original: type[nn.Module]
    shape: LayerShape | None = None  # None for a whole model
    remedies: tuple[Remedy, ...] = ()
    first_values: FirstValues | None = None
    state: tuple[str, ...] = ()  # parameters and modules that were added
    attributes: tuple[str, ...] = ()  # plain attributes that were added


class Converted:
    """Base of all classes made here. The pickle of such a module names its mixin and its original class."""

    mixin: ClassVar[type["Converted"]]
    original: ClassVar[type[nn.Module]]
    conversion: Conversion

    def reset_parameters(self) -> None:
        """Resets the original's and the remedies' parameters to start values (timm calls this after ``to_empty``)."""
        if hasattr(super(), "reset_parameters"):
            super().reset_parameters()
        for remedy in self.conversion.remedies:
            for name, start in remedy.new_state(self.conversion.shape).items():
                if isinstance(start, nn.Module):
                    getattr(self, name).load_state_dict(start.state_dict())
                else:
                    with torch.no_grad():
                        getattr(self, name).copy_(start)

    def __reduce__(self) -> tuple:
        return _restore, (self.mixin, self.original), self.__dict__.copy()


def _restore(mixin: type[Converted], original: type[nn.Module]) -> nn.Module:
    converted = converted_class(mixin, original)
    return converted.__new__(converted)


@cache
def converted_class(mixin: type[Converted], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` whose forward is the mixin's."""
    attributes: dict[str, Any] = dict(mixin=mixin, original=original, __module__=__name__, __doc__=original.__doc__)
    if mixin is Remedied:
        kind = type(KINDS[original])
        attributes["kind"] = type(f"Remedied{kind.__name__}", (RemediedKind, kind), {"__module__": __name__})()
    converted = type(f"{mixin.__name__}{original.__name__}", (mixin, original), attributes)
    if mixin is Remedied:
        KINDS[converted] = converted.kind
    return converted


class RemediedKind:
    """What the analysis sees of a converted attention module: its kind, with the remedies on the maps."""

    def applied_maps(self, attn: "Remedied", heads: Heads) -> Tensor:
        """(B, H, Q, N), after those remedies that act on maps."""
        maps = super().applied_maps(attn, heads)
        for remedy in attn.conversion.remedies:
            if isinstance(remedy, AttentionRemedy) and remedy.has_maps():
                maps = remedy.maps(attn, maps, heads)
        return maps


class Remedied(Converted):
    """An attention module with remedies, between its heads or on its output."""

    kind: ClassVar[Kind]
    fused_attn: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        kind, conversion = self.kind, self.conversion
        heads = kind.split(self, *args, **kwargs)
        heads.fused = heads.fused and self.fused_attn
        if conversion.first_values is not None:
            heads.first_v = conversion.first_values.exchange(conversion.shape.index, heads.v)
        remedies = conversion.remedies
        y = attend(self, tuple(remedy for remedy in remedies if isinstance(remedy, AttentionRemedy)), heads)
        y = kind.merge(self, y, heads)
        for remedy in remedies:
            if isinstance(remedy, BranchRemedy):
                y = on_branch(remedy, self, y, kind, heads)
        return y


class RemediedBlock(Converted):
    """A block with windows: a method of the block, not of the attention layer, returns the whole attention branch."""

    def _attn(self, x: Tensor) -> Tensor:
        return self._with_remedies(super()._attn(x))

    def _partition_attn(self, x: Tensor) -> Tensor:
        return self._with_remedies(super()._partition_attn(x))

    def _window_attn(self, x: Tensor, *args: Any) -> Tensor:
        return self._with_remedies(super()._window_attn(x, *args))

    def _with_remedies(self, y: Tensor) -> Tensor:
        for remedy in self.conversion.remedies:
            y = on_branch(remedy, self, y, kind_of(self.attn))
        return y


class RemediedNorm(Converted):
    """A norm with a remedy in front of it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, ..., C) -> the same shape."""
        tokens = x.flatten(1, -2)
        for remedy in self.conversion.remedies:
            tokens = remedy.before_norm(self, tokens)
        return super().forward(tokens.reshape(x.shape), *args, **kwargs)


def on_branch(remedy: BranchRemedy, module: nn.Module, y: Any, kind: Kind, heads: Heads | None = None) -> Any:
    """Applies a branch remedy to the output of an attention module, in any form; ``heads`` tell padded tokens."""
    if isinstance(y, tuple):
        return on_branch(remedy, module, y[0], kind, heads), *y[1:]
    tokens = y.flatten(1, -2) if kind.channels_last else y.flatten(2).mT

    def token_mean(tokens: Tensor) -> Tensor:
        if heads is None or heads.attn_mask is None:
            return tokens.mean(dim=1, keepdim=True)
        return heads.token_mean(tokens.unsqueeze(1)).squeeze(1)

    tokens = remedy.branch(module, tokens, token_mean)
    return tokens.reshape(y.shape) if kind.channels_last else tokens.mT.reshape(y.shape)
