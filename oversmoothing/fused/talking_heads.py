"""Talking-heads attention without permutes and without keeping a map.

CaiT mixes its attention maps over the heads before and after the softmax (arXiv 2003.02436). timm does it by moving the
heads to the last axis of [B, H, N, N] and back, twice, and keeps the maps before and after for backward. Here a mixing
is one small matrix on [B, H, N * N], and the maps live in a scratch buffer, a few images or some rows of one at a time:
forward keeps only its input, backward makes the maps again.
"""

import math
from collections.abc import Iterator

import torch
from timm.layers import use_fused_attn
from timm.models.cait import TalkingHeadAttn
from torch import Tensor
from torch.autograd.function import once_differentiable

# Size of one scratch buffer. On a CPU the four of backward should stay in the cache (of 32 MB where it was measured);
# elsewhere a chunk only has to be large enough that launching its kernels does not count (a guess, not measured).
CPU_CHUNK_BYTES = 2 * 2**20
CHUNK_BYTES = 256 * 2**20


def mix_heads(attn: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map over the heads: (B, num_heads, N, N) -> the same shape, without permuting the maps.

    Args:
        attn: Attention scores or maps of shape (B, num_heads, N, N).
        weight: Shape (num_heads, num_heads).
        bias: Shape (num_heads,).
    """
    return (weight @ attn.flatten(2) + bias.to(attn.dtype)[:, None]).view_as(attn)


class FusedTalkingHeadAttn(TalkingHeadAttn):
    """timm's ``TalkingHeadAttn``, faster and with less memory; fits the ``attn_block`` slot of timm's ``Cait``.

    With dropout on the attention weights, in TorchScript, under ``torch.compile`` (which fuses by itself) and with
    ``fused_attn = False`` it makes the maps as tensors. Arguments as timm's.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.fused_attn = use_fused_attn()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.proj_drop(self.proj(self.heads(x)))

    def unprojected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, N, C) -> heads (B, N, C), weight (C, C) and bias (C,) of the projection, for ``folding.affine``."""
        return self.heads(x), self.proj.weight, self.proj.bias

    def heads(self, x: Tensor) -> Tensor:
        """The input of the projection, (B, N, C)."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        if not torch.jit.is_scripting():
            if self.fused_attn and runs_eagerly(x) and not (self.training and self.attn_drop.p > 0):
                weight, bias = self.second_mixing(N)
                mixings = self.proj_l.weight, self.proj_l.bias, weight, bias
                return TalkingHeads.apply(qkv, self.scale, *(p.to(qkv.dtype) for p in mixings)).flatten(2)
        q, k, v = qkv.unbind(0)
        attn = mix_heads(q * self.scale @ k.transpose(-2, -1), self.proj_l.weight, self.proj_l.bias).softmax(dim=-1)
        attn = self.remedy(mix_heads(attn, self.proj_w.weight, self.proj_w.bias))
        return (self.attn_drop(attn) @ v).transpose(1, 2).reshape(B, N, C)

    def remedy(self, attn: Tensor) -> Tensor:
        """What a remedy does to the mixed maps, (B, num_heads, N, N) -> the same shape: nothing here."""
        return attn

    def second_mixing(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The mixing after the softmax, with the remedy: weight (num_heads, num_heads) and bias (num_heads,)."""
        return self.proj_w.weight, self.proj_w.bias


class TalkingHeads(torch.autograd.Function):
    """``y = (W_w softmax(W_l S) + b_w) V`` with ``S = scale Q K^T``, a chunk of images or of an image's rows at a time.

    Its arguments are qkv (3, B, num_heads, N, head_dim), scale, W_l, b_l, W_w, b_w, tensors of one dtype. ``b_l``
    cancels in the softmax; it is an argument so that it gets its gradient, zero: DDP waits for one of every parameter.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, scale: float, w_l: Tensor, b_l: Tensor, w_w: Tensor, b_w: Tensor) -> Tensor:
        """-> (B, N, num_heads, head_dim)."""
        ctx.scale = scale
        ctx.save_for_backward(qkv, w_l, b_l, w_w, b_w)
        y = torch.empty_like(qkv[0].transpose(1, 2), memory_format=torch.contiguous_format)
        w_l = w_l * scale
        for images, rows, (scores, attn) in _chunks(qkv, num_buffers=2):
            q, (k, v) = qkv[0, images, :, rows], qkv[1:, images]
            torch.matmul(q, k.mT, out=scores)
            _mix(w_l, scores, out=attn)
            torch.softmax(attn, dim=-1, out=scores)
            _mix(w_w, scores, out=attn).add_(b_w[:, None, None])
            y[images, rows] = (attn @ v).transpose(1, 2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qkv and of the two mixings."""
        qkv, w_l, b_l, w_w, b_w = ctx.saved_tensors
        dy = dy.transpose(1, 2)
        dqkv = torch.empty_like(qkv)
        sum_dtype = torch.promote_types(qkv.dtype, torch.float32)
        dw_l, dw_w, db_w = (torch.zeros_like(p, dtype=sum_dtype) for p in (w_l, w_w, b_w))
        w_l = w_l * ctx.scale
        for images, rows, (scores, attn, mixed, grad) in _chunks(qkv, num_buffers=4):
            q, (k, v) = qkv[0, images, :, rows], qkv[1:, images]
            dq, (dk, dv) = dqkv[0, images, :, rows], dqkv[1:, images]
            torch.matmul(q, k.mT, out=scores)
            _mix(w_l, scores, out=mixed)
            torch.softmax(mixed, dim=-1, out=attn)
            _mix(w_w, attn, out=mixed).add_(b_w[:, None, None])
            _collect(dv, mixed.mT @ dy[images, :, rows], rows)

            torch.matmul(dy[images, :, rows], v.mT, out=grad)
            db_w += grad.sum(dim=(0, 2, 3))
            dw_w += _mix_gradient(grad, attn)
            _mix(w_w.T, grad, out=mixed)
            torch.ops.aten._softmax_backward_data(mixed, attn, -1, attn.dtype, grad_input=grad)
            dw_l += _mix_gradient(grad, scores)
            _mix(w_l.T, grad, out=mixed)
            dq.copy_(mixed @ k)
            _collect(dk, mixed.mT @ q, rows)
        return (
            dqkv,
            None,
            (dw_l * ctx.scale).to(w_l.dtype),
            torch.zeros_like(b_l),
            dw_w.to(w_w.dtype),
            db_w.to(b_w.dtype),
        )


def _chunks(qkv: Tensor, num_buffers: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Slices of the batch and of the queries and, for each, buffers (num_buffers, images, num_heads, rows, N)."""
    _, B, H, N, _ = qkv.shape
    limit = CPU_CHUNK_BYTES if qkv.device.type == "cpu" else CHUNK_BYTES
    row_bytes = H * N * qkv.element_size()
    images = max(1, min(B, limit // (N * row_bytes)))  # 1 for an empty batch too
    parts = math.ceil(N * row_bytes / limit)  # of one image, about equally large
    rows = math.ceil(N / parts)
    scratch = qkv.new_empty(num_buffers, images * H * rows * N)
    for image in range(0, B, images):
        for row in range(0, N, rows):
            shape = min(images, B - image), H, min(rows, N - row), N
            yield (
                slice(image, image + images),
                slice(row, row + rows),
                scratch[:, : math.prod(shape)].view(num_buffers, *shape),
            )


def _mix(weight: Tensor, maps: Tensor, out: Tensor) -> Tensor:
    torch.matmul(weight, maps.flatten(2), out=out.flatten(2))
    return out


def _mix_gradient(grad: Tensor, maps: Tensor) -> Tensor:
    return (grad.flatten(2) @ maps.flatten(2).mT).sum(dim=0)


def _collect(total: Tensor, part: Tensor, rows: slice) -> None:
    """Adds what a chunk of queries gives to the gradient of keys or values; the first one starts the sum."""
    total.copy_(part) if rows.start == 0 else total.add_(part)


def runs_eagerly(x: Tensor) -> bool:
    """Whether an operator called now computes; False where it is only recorded, for a compiler or an exporter."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy))
