"""Talking-heads attention without permutes and without keeping a map.

CaiT mixes its attention maps over the heads before and after the softmax (arXiv 2003.02436). timm does it by moving the
heads to the last axis of [B, H, N, N] and back, twice, and keeps the maps before and after for backward. Here a mixing
is one small matrix on [B, H, N * N], and the maps live in a scratch buffer, for a few images or some rows of one image
at a time: forward keeps only its input, backward recomputes the maps.

For ``torch.compile`` and ``torch.export`` it is a custom operator, ``torch.ops.oversmoothing.talking_heads``, which
they keep as one call. Eager code does without the operator's dispatch, most of which runs in Python; so other tracers,
such as ``make_fx``, see the operators that it is made of.
"""

import math
from collections.abc import Callable, Iterator
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from timm.layers import use_fused_attn
from timm.models.cait import TalkingHeadAttn
from torch import Tensor
from torch.autograd.function import once_differentiable

from .folding import Foldable, foldable_projection, recorded

# Size of one scratch buffer. On a CPU the four buffers of backward should stay in the cache (measured with 32 MB).
# Elsewhere a chunk has to be so large that the launch of its kernels is negligible; this size is a guess, not measured:
# `python scripts/check_gpu.py --only chunk` measures it.
CPU_CHUNK_BYTES = 2 * 2**20
CHUNK_BYTES = 256 * 2**20


def mix_heads(attn: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map over the heads: (B, num_heads, N, N) -> the same shape, without permuting the maps.

    Args:
        attn: Attention scores or maps of shape (B, num_heads, N, N).
        weight: Shape (num_heads, num_heads).
        bias: Shape (num_heads,).
    """
    mixed = weight @ attn.flatten(2)
    return (mixed + bias.to(mixed.dtype)[:, None]).view_as(attn)  # a float32 bias would double half-precision maps


class FusedTalkingHeadAttn(TalkingHeadAttn):
    """timm's ``TalkingHeadAttn``, faster and with less memory; fits the ``attn_block`` slot of timm's ``Cait``.

    With dropout on the attention weights, in TorchScript, under fx and with ``fused_attn = False`` it makes the maps as
    tensors. The weights of ``proj_l`` and ``proj_w`` are read, the modules are not called: hooks on them do nothing.
    Arguments as timm's.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.fused_attn = use_fused_attn()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.proj_drop(self.proj(self.heads(x)))

    def unprojected(self, x: Tensor) -> tuple[Tensor, None]:
        """(B, N, C) -> the arguments of ``folding.Fold.project``: heads (B, N, C), and no means."""
        return self.heads(x), None

    @torch.jit.unused
    def foldable(self) -> Foldable | None:
        """The projection."""
        return foldable_projection(self)

    def heads(self, x: Tensor) -> Tensor:
        """The input of the projection, (B, N, C)."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        if not torch.jit.is_scripting():
            if self.fused_attn and not recorded(x) and not (self.training and self.attn_drop.p > 0):
                weight, bias = self.second_mixing(N)
                return talking_heads(qkv, self.scale, self.proj_l.weight, self.proj_l.bias, weight, bias).flatten(2)
        q, k, v = qkv.unbind(0)
        attn = mix_heads(q * self.scale @ k.transpose(-2, -1), self.proj_l.weight, self.proj_l.bias).softmax(dim=-1)
        attn = self.remedy(mix_heads(attn, self.proj_w.weight, self.proj_w.bias))
        return (self.attn_drop(attn) @ v).transpose(1, 2).reshape(B, N, C)

    def remedy(self, attn: Tensor) -> Tensor:
        """A remedy on the mixed maps, (B, num_heads, N, N) -> the same shape; here the identity."""
        return attn

    def second_mixing(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The mixing after the softmax, with the remedy: weight (num_heads, num_heads) and bias (num_heads,)."""
        return self.proj_w.weight, self.proj_w.bias

    @torch.jit.unused
    def foldable_mixing(self, num_tokens: int) -> Foldable | None:
        """What ``second_mixing`` is made of; None if it is ``proj_w`` alone."""
        return None


def _keys(*names: str) -> torch._C.DispatchKeySet:
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return reduce(or_, keys)


_AUTOCAST = _keys("AutocastCPU", "AutocastCUDA")
_BOTH = _AUTOCAST | _keys("AutogradCPU", "ADInplaceOrView")  # autograd's key is one for all devices


# ---- the function ----------------------------------------------------------------------------------------------------
def talking_heads(qkv: Tensor, scale: float, w_l: Tensor, b_l: Tensor, w_w: Tensor, b_w: Tensor) -> Tensor:
    """``y = (W_w softmax(W_l S) + b_w) V`` with ``S = scale Q K^T``, a chunk of images or of an image's rows at a time.

    ``b_w V`` is one vector per image and head. ``b_l`` cancels in the softmax; it is an argument so that it gets a
    gradient of zero: DDP waits for a gradient of every parameter.

    Args:
        qkv: Shape (3, B, num_heads, N, head_dim); under autocast it is cast to autocast's precision.
        scale: Dimensionless factor on the scores.
        w_l: Shape (num_heads, num_heads), as ``w_w``. Weights and biases may be float32 with a half-precision ``qkv``.
        b_l: Shape (num_heads,), as ``b_w``.
        w_w: The mixing after the softmax.
        b_w: Its bias.

    Returns:
        Shape (B, N, num_heads, head_dim), the dtype of ``qkv``.
    """
    if torch.compiler.is_compiling():
        return operator(qkv, scale, w_l, b_l, w_w, b_w)
    device_type = qkv.device.type
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        qkv = _as_autocast(qkv, device_type)
    return _Eager.apply(qkv, scale, w_l, b_l, w_w, b_w)


def _output(qkv: Tensor, scale: float, w_l: Tensor, b_l: Tensor, w_w: Tensor, b_w: Tensor) -> Tensor:
    y = _empty_output(qkv)
    w_l, w_w = w_l.to(qkv.dtype), w_w.to(qkv.dtype)
    offset = b_w[:, None, None] * _sum_tokens(qkv[2])
    for images, rows, q, k, v, (scores, attn) in _chunks(qkv, num_buffers=2):
        _scores(q, k, scale, out=scores)
        _mix(w_l, scores, out=attn)
        torch.softmax(attn.maps, dim=-1, out=scores.maps)
        _mix(w_w, scores, out=attn)
        part = y[images, rows].transpose(1, 2)
        torch.add(torch.bmm(attn.maps, v).view(part.shape), offset[images], out=part)
    return y


def _gradients(
    dy: Tensor, qkv: Tensor, scale: float, w_l: Tensor, w_w: Tensor, b_w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``qkv``, ``w_l``, ``w_w`` and ``b_w``, each in its dtype; ``dy`` is the gradient of the output."""
    if qkv.numel() == 0:  # an empty batch
        return _empty_gradient(qkv).zero_(), torch.zeros_like(w_l), torch.zeros_like(w_w), torch.zeros_like(b_w)
    dy = dy.transpose(1, 2)
    dqkv = _empty_gradient(qkv)
    mix_l, mix_w = w_l.to(qkv.dtype), w_w.to(qkv.dtype)
    dw_l = dw_w = None
    sum_dy, zero, factor = _sum_tokens(dy), qkv.new_zeros(()), _gradient_factor(qkv)
    dv_offset = (b_w[:, None, None] * sum_dy).to(qkv.dtype)
    for images, rows, q, k, v, (scores, attn, mixed, grad) in _chunks(qkv, num_buffers=4):
        dq, dk, dv = dqkv[:, images].flatten(1, 2).unbind()
        part = dy[images, :, rows].flatten(0, 1)
        first = rows.start == 0
        _scores(q, k, scale, out=scores)
        _mix(mix_l, scores, out=mixed)
        torch.softmax(mixed.maps, dim=-1, out=attn.maps)
        _mix(mix_w, attn, out=mixed)
        torch.baddbmm(dv_offset[images].flatten(0, 1) if first else dv, mixed.maps.mT, part, out=dv)

        torch.bmm(part, v.mT, out=grad.maps)
        dw_w = _mix_gradient(dw_w, grad, attn)
        _mix(mix_w.T, grad, out=mixed)
        _softmax_gradient(mixed.maps, attn.maps, factor, zero, out=grad.maps)
        dw_l = _mix_gradient(dw_l, grad, scores)
        _mix(mix_l.T, grad, out=mixed)
        dq = dq[:, rows]
        torch.baddbmm(dq, mixed.maps, k, beta=0, alpha=scale / factor, out=dq)
        torch.baddbmm(dk, mixed.maps.mT, q, beta=0 if first else 1, alpha=scale / factor, out=dk)
    db_w = torch.sum(sum_dy * _sum_tokens(qkv[2]), dim=(0, 2, 3))
    return dqkv, (dw_l / factor).to(w_l.dtype), dw_w.to(w_w.dtype), db_w.to(b_w.dtype)


def _empty_output(qkv: Tensor, *other: object) -> Tensor:
    _, B, H, N, D = qkv.shape
    return qkv.new_empty(B, N, H, D)


def _empty_gradient(qkv: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)  # (images, heads) as one dimension is a view


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    qkv, ctx.scale, w_l, b_l, w_w, b_w = inputs
    ctx.save_for_backward(qkv, w_l, b_l, w_w, b_w)


def _backward(gradients: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of a node of autograd, by ``_gradients`` or by the operator that calls it."""

    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        qkv, w_l, b_l, w_w, b_w = ctx.saved_tensors
        dqkv, dw_l, dw_w, db_w = gradients(dy, qkv, ctx.scale, w_l, w_w, b_w)
        return dqkv, None, dw_l, torch.zeros_like(b_l), dw_w, db_w

    return backward


def _straight(function: Callable) -> Callable:
    """``function``, whose operators go straight to their kernels: autocast casts nothing, autograd looks at nothing.

    Inside of a node of autograd there is nothing to record, and asking takes a tenth of the host's time in this node.
    Dispatch modes, such as selective checkpointing, rely on what autograd notes of operators that write into a tensor.
    """

    def straight(*args):
        if torch.compiler.is_compiling():  # compiled autograd, which cannot trace the guard and needs none
            return function(*args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST if torch._C._len_torch_dispatch_stack() else _BOTH):
            return function(*args)

    return straight


_straight_output = _straight(_output)


class _Eager(torch.autograd.Function):
    """The function in eager code, in one node of autograd."""

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:  # with a separate setup_context, apply() looks at the signature at each call
        _setup_context(ctx, inputs, None)
        return _straight_output(*inputs)

    # Not all of backward goes straight: reading the saved tensors may run a part of the model again (checkpointing).
    backward = staticmethod(once_differentiable(_backward(_straight(_gradients))))


# ---- the same as an operator of torch --------------------------------------------------------------------------------
operator = torch.library.custom_op("oversmoothing::talking_heads", _output, mutates_args=())
_backward_operator = torch.library.custom_op("oversmoothing::talking_heads_backward", _gradients, mutates_args=())
operator.register_fake(_empty_output)


@_backward_operator.register_fake
def _(dy, qkv, scale, w_l, w_w, b_w):
    return _empty_gradient(qkv), torch.empty_like(w_l), torch.empty_like(w_w), torch.empty_like(b_w)


operator.register_autograd(_backward(_backward_operator), setup_context=_setup_context)


def _as_autocast(qkv: Tensor, device_type: str) -> Tensor:
    """``qkv`` in autocast's precision; autocast leaves float64 alone."""
    return qkv if qkv.dtype == torch.float64 else qkv.to(torch.get_autocast_dtype(device_type))


def _autocast(device_type: str):
    def kernel(keyset, qkv: Tensor, *others):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operator(_as_autocast(qkv, device_type), *others)

    return kernel


# `torch.library.register_autocast` fixes one precision; autocast's own is only known when the operator is called.
_library = torch.library.Library("oversmoothing", "FRAGMENT")
_library.impl("talking_heads", _autocast("cpu"), "AutocastCPU", with_keyset=True)
_library.impl("talking_heads", _autocast("cuda"), "AutocastCUDA", with_keyset=True)


def talking_heads_as_maps(qkv: Tensor, scale: float, w_l: Tensor, b_l: Tensor, w_w: Tensor, b_w: Tensor) -> Tensor:
    """The operator's definition in torch's own operators, for exported files that have to run without this package."""
    q, k, v = qkv.unbind(0)
    attn = mix_heads(q * scale @ k.mT, w_l.to(qkv.dtype), b_l).softmax(dim=-1)
    return (mix_heads(attn, w_w.to(qkv.dtype), b_w) @ v).transpose(1, 2).contiguous()


# ---- its parts -------------------------------------------------------------------------------------------------------
class _Buffer(NamedTuple):
    """Scratch memory for the maps of a chunk, seen in two ways."""

    maps: Tensor  # (images * num_heads, rows, N)
    heads: Tensor  # (images, num_heads, rows * N)


def _chunks(qkv: Tensor, num_buffers: int) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, list[_Buffer]]]:
    """For each chunk: its slice of the images and of the queries, these queries, keys and values, and scratch buffers.

    Queries have shape (images * num_heads, rows, head_dim), keys and values N in place of rows.
    """
    _, B, H, N, _ = qkv.shape
    limit = CPU_CHUNK_BYTES if qkv.device.type == "cpu" else CHUNK_BYTES
    row_bytes = H * N * qkv.element_size()
    images = max(1, min(B, limit // (N * row_bytes)))  # 1 for an empty batch too
    parts = math.ceil(N * row_bytes / limit)  # of one image, of about equal size
    rows = math.ceil(N / parts)
    scratch = qkv.new_empty(num_buffers, images * H * rows * N)
    for image in range(0, B, images):
        n = min(images, B - image)
        q, k, v = qkv[:, image : image + n].flatten(1, 2).unbind()  # copies several images, in one operator
        for row in range(0, N, rows):
            r = min(rows, N - row)
            used = scratch[:, : n * H * r * N]
            buffers = map(_Buffer, used.view(-1, n * H, r, N).unbind(), used.view(-1, n, H, r * N).unbind())
            yield slice(image, image + n), slice(row, row + r), q[:, row : row + r], k, v, list(buffers)


def _scores(q: Tensor, k: Tensor, scale: float, out: _Buffer) -> None:
    torch.baddbmm(out.maps, q, k.mT, beta=0, alpha=scale, out=out.maps)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() == 2 else x.dtype


def _sum_tokens(x: Tensor) -> Tensor:
    """(B, num_heads, N, head_dim) -> (B, num_heads, 1, head_dim), at least in float32."""
    return x.sum(dim=-2, keepdim=True, dtype=_sum_dtype(x))


def _mix(weight: Tensor, maps: _Buffer, out: _Buffer) -> None:
    torch.bmm(weight.expand(len(maps.heads), -1, -1), maps.heads, out=out.heads)


def _mix_gradient(total: Tensor | None, grad: _Buffer, maps: _Buffer) -> Tensor:
    part = torch.bmm(grad.heads, maps.heads.mT).sum(dim=0, dtype=_sum_dtype(grad.heads))
    return part if total is None else total.add_(part)


def _gradient_factor(qkv: Tensor) -> float:
    """Factor on the gradient of the scores within backward, divided out again; a power of two, so nothing is rounded.

    An entry of a map is about 1 / N, so without the factor this gradient underflows in float16.
    """
    return 2.0 ** round(math.log2(max(1, qkv.shape[3]))) if qkv.element_size() == 2 else 1.0


def _softmax_gradient(grad: Tensor, attn: Tensor, factor: float, zero: Tensor, out: Tensor) -> None:
    """``factor`` times the gradient of the softmax's input; ``grad`` is overwritten."""
    if grad.device.type == "cpu" and factor == 1:  # one pass; on CUDA it would need another buffer in half precision
        torch.ops.aten._softmax_backward_data(grad, attn, -1, attn.dtype, grad_input=out)
        return
    torch.addcmul(zero, attn, grad, value=factor, out=grad)
    torch.addcmul(grad, attn, grad.sum(dim=-1, keepdim=True, dtype=_sum_dtype(grad)), value=-1, out=out)
