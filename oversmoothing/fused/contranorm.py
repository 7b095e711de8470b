"""ContraNorm's mixing, without keeping a map and with one matrix product less than attention needs.

Queries and keys are the same unit vectors ``n``, so ``E = exp(n n^T / tau)`` is symmetric and bounded: the exponential
needs no maximum subtracted, and the gradient of ``n`` is one product, ``(G + G^T) n``. ``E`` lives in a scratch
buffer, one image at a time; forward keeps only tensors over the tokens, backward recomputes ``E``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .folding import autocast_dtype, recorded


def can_mix(x: Tensor, tau: float) -> bool:
    """Whether :class:`ContraMixing` can compute tokens (B, N, C).

    It can on a CPU (elsewhere a loop over the images would be launches of small kernels), in eager mode, in float32 or
    float64 without autocast, if N <= C and ``exp(1 / tau)`` is far from overflow.
    """
    full = x.is_cpu and x.dtype in (torch.float32, torch.float64) and autocast_dtype(x) is None
    return full and x.shape[1] <= x.shape[2] and tau >= 0.02 and not (recorded(x) or torch.compiler.is_compiling())


class ContraMixing(torch.autograd.Function):
    """``x - s softmax(n n^T / tau) x`` with ``n = x / |x|``; arguments: x (B, N, C), s (C,) and tau."""

    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor, tau: float) -> Tensor:
        """-> (B, N, C)."""
        inverse = 1 / x.norm(dim=-1, keepdim=True).clamp_(min=1e-12)
        n, z, sums = x * inverse, torch.empty_like(x), torch.empty_like(inverse)
        for similarity, (n_b, x_b, z_b, sums_b) in _images(n, x, z, sums):
            _exponential(n_b, tau, out=similarity)
            torch.sum(similarity, dim=-1, keepdim=True, out=sums_b)
            torch.mm(similarity, x_b, out=z_b).div_(sums_b)
        ctx.tau = tau
        ctx.save_for_backward(x, s, n, z, sums, inverse)
        return torch.addcmul(x, z, s, value=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Gradients of x and s."""
        x, s, n, z, sums, inverse = ctx.saved_tensors
        ds = -(grad * z).sum(dim=(0, 1)) if ctx.needs_input_grad[1] else None
        w = (grad * s).div_(sums).neg_()  # gradient of E x
        shift = (w * z).sum(dim=-1, keepdim=True)
        dx, dn, G = torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[1], x.shape[1])
        for similarity, (n_b, x_b, w_b, shift_b, grad_b, dx_b, dn_b) in _images(n, x, w, shift, grad, dx, dn):
            _exponential(n_b, ctx.tau, out=similarity)
            torch.addmm(grad_b, similarity, w_b, out=dx_b)
            torch.addmm(shift_b, w_b, x_b.mT, beta=-1, out=G).mul_(similarity)
            torch.add(G, G.mT, out=similarity)
            torch.mm(similarity, n_b, out=dn_b)
        dn.mul_(inverse / ctx.tau)
        along = (dn * n).sum(dim=-1, keepdim=True)
        return dx.add_(dn).addcmul_(n, along, value=-1), ds, None


def _images(*tensors: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """For each image, a scratch map (N, N) and the image's slices of the (B, N, any) tensors."""
    scratch = tensors[0].new_empty(tensors[0].shape[1], tensors[0].shape[1])
    for image in zip(*tensors, strict=True):
        yield scratch, image


def _exponential(n: Tensor, tau: float, out: Tensor) -> Tensor:
    torch.mm(n, n.mT, out=out)
    return (out if tau == 1 else out.div_(tau)).exp_()
