"""Folding: an affine remedy costs nothing if the attention layer's output projection computes it.

AttnScale scales the heads, FeatScale the output of the attention branch, and each adds one vector per image. ``proj``
is affine too, so it composes with them into one projection, with another weight (recomputed in every step: parameters
are never rewritten) and one vector per image in place of the bias. Backward keeps no further tensor over the tokens.

A layer that supports folding has two methods: ``unprojected(x, ...) -> (heads, means)``, the arguments of
``Fold.project``, and ``foldable()``, from which its ``Fold`` is made. ``set_fused`` turns this and every other fast
path of this package off and on.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook


def set_fused(model: nn.Module, enabled: bool) -> nn.Module:
    """Switches every fast path of ``model`` off, or on again; the same as building it with ``fused=enabled``.

    Off means the definitions: attention maps as tensors, the remedies as written in the paper, every token through the
    last block. Second derivatives and timm's ``AttentionExtract`` need that. The switch is timm's own attribute
    ``fused_attn``, so timm's attention layers follow too, and models built after ``timm.layers.set_fused_attn(False)``
    start with it off. timm's Swin makes its maps as tensors by default: there "on" changes which kernel computes
    ``A V``.

    Returns:
        ``model`` itself.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = enabled
        if hasattr(module, "folds"):
            module.folds = enabled
    return model


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has to be called, and reading its weight is not enough.

    It has a hook, or a ``forward`` that belongs to the instance, or its call is compiled (``module.compile()``).
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None


def call(parent: nn.Module, name: str, x: Tensor) -> Tensor:
    """``parent.<name>(x)`` for an ``nn.Module``; identities, and dropout that is off, are not called.

    A transformer has about eleven of these in each block. Their calls take the host 1 to 3 us each, this one 0.4. They
    are called where somebody would notice: hooks, also those on all modules of a process, and graphs of fx.
    """
    module = parent._modules[name]  # what nn.Module.__getattr__ looks up, after it has failed elsewhere
    idle = type(module) is nn.Identity or (type(module) is nn.Dropout and not (module.training and module.p))
    return x if idle and not is_watched(module, x) else module(x)


def is_watched(module: nn.Module, x: Tensor) -> bool:
    """Whether somebody would notice that ``module(x)`` is not called, though what it computes is computed."""
    return has_hooks(module) or _has_any_global_hook() or isinstance(x, torch.fx.Proxy)


def any_hooks(module: nn.Module) -> bool:
    """Whether any hook is registered on ``module`` or on a module inside it."""
    return has_hooks(module) or any(any_hooks(part) for part in module._modules.values() if part is not None)


def recorded(x: Tensor) -> bool:
    """Whether operators are now recorded (``torch.jit.trace``, ``torch.fx``) or transformed (``torch.func``).

    All three support torch's own operators only.
    """
    if torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's precision on the device of ``x``; None where autocast is off."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # the meta device has no autocast: asking raises
        return None
    return torch.get_autocast_dtype(device)


class Fold(NamedTuple):
    """A projection with everything affine that follows it: ``heads weight^T + means of_means^T + bias``.

    It may also hold the projections of L layers: then L is the first dimension of each tensor.

    Attributes:
        weight: Shape (C, C_in).
        of_means: Shape (C, K C_in), acts on K vectors per image; None for K = 0.
        bias: Shape (C,), or None.
        layer_scale: Whether LayerScale is among what follows.
    """

    weight: Tensor
    of_means: Tensor | None
    bias: Tensor | None
    layer_scale: bool = False

    def project(self, heads: Tensor, means: Tensor | None) -> Tensor:
        """(B, N, C_in) and, for K > 0, (B, K C_in) -> (B, N, C)."""
        if self.of_means is None:
            return F.linear(heads, self.weight, self.bias)
        # Not in place, which takes the host longer.
        return F.linear(heads, self.weight) + F.linear(means, self.of_means, self.bias).unsqueeze(1)


class Gains(NamedTuple):
    """What remedies do to a projection, as factors. None: factor one. For L layers, L is the first dimension.

    Attributes:
        weight: Shape (C or 1, num_heads or 1): a factor per output channel and per head's columns.
        of_means: The same for each copy of the weight that acts on a mean.
        bias: Shape (C,).
        shift: Added to the bias, shape (C,).
    """

    weight: Tensor | None = None
    of_means: tuple[Tensor, ...] = ()
    bias: Tensor | None = None
    shift: Tensor | None = None


class Foldable(NamedTuple):
    """What a fold is made of: a projection, and ``gains(*settings, *parameters)``.

    For L layers together, ``weight`` is the tuple of their weights, and L is the first dimension of the other tensors.

    Attributes:
        gains: Makes the ``Gains``.
        settings: The same for all layers whose folds are made together.
        weight: Shape (C, C_in).
        bias: Shape (C,), or None.
        parameters: The remedies' parameters.
        num_heads: Heads of the gains; 1 if no gain differs between heads.
        layer_scale: Whether the gains hold LayerScale.
    """

    gains: Callable[..., Gains]
    settings: tuple
    weight: Tensor | tuple[Tensor, ...]
    bias: Tensor | None
    parameters: tuple[Tensor, ...] = ()
    num_heads: int = 1
    layer_scale: bool = False

    def make(self) -> Fold:
        """Makes the fold."""
        gains = self.gains(*self.settings, *self.parameters)
        bias = self.bias
        if bias is not None and gains.bias is not None:
            bias = gains.bias.to(bias.dtype) * bias
        if bias is not None and gains.shift is not None:
            bias = bias + gains.shift.to(bias.dtype)
        if gains.weight is None:
            return Fold(self.weight, None, bias, self.layer_scale)
        factors = gains.weight, *gains.of_means
        if isinstance(self.weight, tuple):
            weight, *of_means = _Products.apply(self.num_heads, len(self.weight), *self.weight, *factors)
        else:
            weight, *of_means = (_times(self.weight, factor, self.num_heads) for factor in factors)
        of_means = torch.cat(of_means, dim=-1) if len(of_means) > 1 else of_means[0] if of_means else None
        return Fold(weight, of_means, bias, self.layer_scale)


def foldable_projection(attn: nn.Module) -> Foldable | None:
    """``attn.proj`` alone; None with fast paths off, or if it is wrapped (LoRA), parametrised or hooked."""
    proj = attn.proj
    if not attn.fused_attn or type(proj) is not nn.Linear or has_hooks(proj):
        return None
    return Foldable(Gains, (), proj.weight, proj.bias)


def _times(weight: Tensor, gain: Tensor, num_heads: int) -> Tensor:
    gain = gain.to(weight.dtype)
    if num_heads == 1:
        return weight * gain
    return (weight.unflatten(-1, (num_heads, -1)) * gain.unsqueeze(-1)).flatten(-2)


class _Products(torch.autograd.Function):
    """``_times`` of the stacked weights of layers with several gains; backward stacks the weights again."""

    @staticmethod
    def forward(ctx, num_heads: int, layers: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``tensors`` are the weights of the layers, then the gains."""
        ctx.num_heads, ctx.layers = num_heads, layers
        ctx.save_for_backward(*tensors)
        stack = torch.stack(tensors[:layers])
        return tuple(_times(stack, gain, num_heads) for gain in tensors[layers:])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weights and of the gains."""
        weights, gains = ctx.saved_tensors[: ctx.layers], ctx.saved_tensors[ctx.layers :]
        stack, of_stack, of_gains = torch.stack(weights), None, []
        for grad, gain in zip(grads, gains, strict=True):
            part = _times(grad, gain, ctx.num_heads)
            of_stack = part if of_stack is None else of_stack.add_(part)
            of_gain = (grad * stack).unflatten(-1, (ctx.num_heads, -1)).sum(dim=-1)
            of_gains.append(of_gain.sum_to_size(gain.shape).to(gain.dtype))
        return None, None, *of_stack.unbind(), *of_gains


_PLAIN = frozenset({Tensor, nn.Parameter, type(None)})  # types of tensors that may be stacked

_shared: ContextVar[Mapping[Hashable, Fold]] = ContextVar("_shared", default=MappingProxyType({}))


def shared_fold(key: Hashable) -> Fold | None:
    """The fold that ``share_folds`` made for ``key``; None outside of its context, and under a compiler."""
    return None if torch.compiler.is_compiling() else _shared.get().get(key)


def folded(layer: nn.Module) -> Fold | None:
    """The fold of ``layer``; None where it cannot be folded."""
    fold = shared_fold(layer)
    if fold is None and (foldable := layer.foldable()) is not None:
        fold = foldable.make()
    return fold


def foldables(blocks: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Foldable]]:
    """The blocks that can be folded, or their ``attn``, for ``share_folds``."""
    for block in blocks:
        for layer in (block, getattr(block, "attn", None)):
            # Look up the class: on an instance, a missing name is searched in all of the module's dictionaries.
            if hasattr(type(layer), "foldable") and (foldable := layer.foldable()) is not None:
                yield layer, foldable
                break


@contextmanager
def share_folds(foldables: Iterable[tuple[Hashable, Foldable]], x: Tensor) -> Iterator[None]:
    """Within the context, folds of the same form are made together: as many operators for all layers as for one.

    On a GPU a small batch waits for the host, whose time grows with the number of operators. The values are the same.
    The gradients of these parameters arrive together at the end of backward, where DDP sends them. Do not use this with
    gradient checkpointing, which runs the layers again outside of the context.

    Args:
        foldables: What to make, each with the key under which its layer looks for it.
        x: The model's input; it decides the device and, under autocast, the precision of the folds.
    """
    if torch.compiler.is_compiling() or recorded(x):
        yield
        return
    alike = defaultdict(dict)
    for key, foldable in foldables:
        gains, settings, weight, bias, parameters, num_heads, layer_scale = foldable
        # Other tensors, such as shards of a parameter, may only be touched in their layer.
        if parameters and _PLAIN.issuperset(map(type, (weight, bias, *parameters))):
            # The weight's shape and the settings decide the other shapes.
            alike[gains, settings, num_heads, layer_scale, bias is None, weight.shape, weight.dtype][key] = foldable
    dtype = autocast_dtype(x) if x.dtype != torch.float64 else None
    shared = {}
    for (gains, settings, num_heads, layer_scale, no_bias, *_), group in alike.items():
        _, _, weights, biases, parameters, *_ = zip(*group.values(), strict=True)
        biases = None if no_bias else torch.stack(biases)
        parameters = tuple(torch.stack(tensors) for tensors in zip(*parameters, strict=True))
        *fold, _ = Foldable(gains, settings, weights, biases, parameters, num_heads).make()
        each = ([None] * len(group) if t is None else t.to(dtype or t.dtype).unbind() for t in fold)
        shared |= {key: Fold(*tensors, layer_scale) for key, *tensors in zip(group, *each, strict=True)}
    token = _shared.set(shared)
    try:
        yield
    finally:
        _shared.reset(token)


class FoldedAttention(Attention):
    """timm's ``Attention`` in two halves, the part before the projection and the projection; arguments as timm's."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, num_queries: int | None = None
    ) -> Tensor:
        """(B, N, C) -> (B, N, C), or the first ``num_queries`` tokens of it (B, num_queries, C), without a mask."""
        if not torch.jit.is_scripting():
            fold = folded(self)
            if fold is not None:
                heads, v = self.heads(x, attn_mask, is_causal, num_queries, True)
                return call(self, "proj_drop", fold.project(heads, self.means(v)))
        heads, v = self.heads(x, attn_mask, is_causal, num_queries)
        return self.proj_drop(self.proj(heads))

    def first_tokens(self, x: Tensor, num_tokens: int) -> Tensor:
        """The output for the first ``num_tokens``: (B, N, C) -> (B, num_tokens, C)."""
        return self(x, num_queries=num_tokens)

    def unprojected(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> the arguments of ``Fold.project``: heads (B, N, attn_dim), and means."""
        heads, v = self.heads(x, attn_mask, is_causal, None, True)
        return heads, self.means(v)

    def heads(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        num_queries: int | None = None,
        folded: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The input of the projection, (B, num_queries or N, attn_dim), and the values, (B, num_heads, N, head_dim)."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if num_queries is not None:
            q = q[:, :, :num_queries]
        if torch.jit.is_scripting():
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            q, k = call(self, "q_norm", q), call(self, "k_norm", k)
        y = self.attend(q, k, v, attn_mask, is_causal, folded).transpose(1, 2).flatten(2)
        y = self.norm(y) if torch.jit.is_scripting() else call(self, "norm", y)
        if self.gate is not None:
            y = y * self.gate(x[:, :num_queries]).sigmoid()
        return y, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, folded: bool
    ) -> Tensor:
        """Attention per head: q (B, num_heads, Q, head_dim), k and v over N tokens -> the shape of q.

        With ``folded``, it leaves out what ``foldable`` puts into the projection.
        """
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        return self.attn_drop(self.maps(q, k, attn_mask, is_causal)) @ v

    def maps(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """The attention maps, (B, num_heads, Q, N)."""
        attn = q * self.scale @ k.transpose(-2, -1)
        mask = resolve_self_attn_mask(k.shape[-2], attn, attn_mask, is_causal)
        return maybe_add_mask(attn, mask).softmax(dim=-1)  # timm's function, which fx does not trace into

    def foldable(self) -> Foldable | None:
        """The projection; subclasses fold their remedy in here."""
        return foldable_projection(self)

    def means(self, v: Tensor) -> Tensor | None:
        """The vectors that ``Fold.of_means`` acts on, from the values (B, num_heads, N, head_dim)."""
        return None
