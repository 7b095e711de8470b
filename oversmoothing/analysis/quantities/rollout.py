"""Attention rollout: the product of the layers' maps says from which patches a token is mixed after several layers."""

import torch
from torch import Tensor

from .. import spectrum
from ..probe import LayerView, has_class_token
from .base import Group


def rollout_step(rollout: Tensor | None, attn: Tensor) -> Tensor:
    """Adds one layer: ``(A / 2 + I / 2) R``, where the identity stands for the residual branch.

    Args:
        rollout: ``R`` (B, N, N) of the previous layers, None at the first.
        attn: ``A`` (B, N, N) of this layer, averaged over its heads; rows sum to one.

    Returns:
        Shape (B, N, N), rows sum to one: how much of each input token is in each output token.

    Source: Abnar and Zuidema, "Quantifying attention flow in transformers", arXiv 2005.00928.
    """
    step = (attn + torch.eye(attn.shape[-1], dtype=attn.dtype, device=attn.device)) / 2
    return step if rollout is None else step @ rollout


class Rollout(Group):
    """Rollout from the first layer to each layer, of the maps that multiply the values if their rows sum to one.

    So AttnScale's maps are used, although some entries may be negative. CaiT's mixed maps and those of remedies that
    change the row sum are replaced by the softmax maps, and the report says so. Keeps one N x N product per image.
    """

    name = "rollout"
    about = "the product of the maps of all layers so far, residual branch included"
    quantities = {
        "rollout_entropy": (
            "entropy over the patches of the class token's rollout, or of the mean row without one; what is negative "
            "counts as zero (nats, log of the number of patches when uniform)"
        ),
        "rollout_high_frequency_response": (
            "mean of the rollout's spectral response over all frequencies but zero (gain); 0 when all tokens are made "
            "of the same mixture"
        ),
    }
    image_map = "rollout × number of patches"

    def begin(self, images: Tensor, grid: tuple[int, int]) -> None:
        """Drops the product of the previous forward pass."""
        super().begin(images, grid)
        self._rollout: Tensor | None = None
        self._is_broken = False

    def measure(self, view: LayerView) -> dict[str, Tensor]:
        """Shape (B,) each."""
        if not self._advance(view):
            return {}
        row = self._row(view).clamp_min(0)
        return {
            "rollout_entropy": torch.special.entr(row / row.sum(dim=-1, keepdim=True)).sum(dim=-1),
            "rollout_high_frequency_response": spectrum.high_frequency_response(self._rollout),
        }

    def over_image(self, view: LayerView) -> Tensor | None:
        """The class token's row, or the mean row without one, over the grid (rows, columns); 1 if uniform."""
        if not self._advance(view) or not view.layer.kind.raster:
            return None
        row = self._row(view)[0]
        return len(row) * (row / row.sum()).reshape(self.grid_of(view))

    def _advance(self, view: LayerView) -> bool:
        """Multiplies the product by the layer's maps; returns whether it covers all layers so far."""
        layout = None if self._is_broken else self.patch_layout(view)
        if layout is None or layout.is_window:
            reason = (
                "its attention is in windows" if view.layer.kind.windowed else "its tokens are not the image's patches"
            )
            self._leave_out(view, "a layer before is left out" if self._is_broken else reason)
            return False
        maps = view.attention_maps()
        used = maps.applied
        if not torch.allclose(used.sum(dim=-1), used.new_ones(()), atol=1e-3):
            used = maps.softmax
            self.left_out[view.layer.name] = "the applied maps: their rows do not sum to one; the softmax is used"
        mean_map = spectrum.as_maps(used).mean(dim=1)
        if self._rollout is not None and self._rollout.shape != mean_map.shape:
            self._leave_out(view, "it has another number of tokens than the layer before")
            return False
        self._rollout = rollout_step(self._rollout, mean_map)
        return True

    def _leave_out(self, view: LayerView, reason: str) -> None:
        self.left_out[view.layer.name] = reason
        self._is_broken = True

    def _row(self, view: LayerView) -> Tensor:
        """(B, P): the row of the class token; without one, the mean row, also if there are registers."""
        prefix = self.patch_layout(view).prefix
        row = self._rollout[:, 0] if prefix and has_class_token(self.subject.model) else self._rollout.mean(dim=1)
        return row[:, prefix:]
