"""Attention distance: the distance between query and key patches, weighted by the attention."""

import torch
from torch import Tensor

from ..probe import LayerView
from ..spectrum import as_maps
from .base import Group


def patch_distances(rows: int, columns: int, height: float = 1.0, width: float = 1.0) -> Tensor:
    """Euclidean distances between the centres of all patches of a grid.

    Args:
        rows: Patches along the height of the image.
        columns: Patches along its width.
        height: Of one patch, in pixels.
        width: Of one patch, in pixels.

    Returns:
        Shape (rows * columns, rows * columns), in pixels, float64, patches row by row.
    """
    y, x = torch.arange(rows, dtype=torch.float64) * height, torch.arange(columns, dtype=torch.float64) * width
    centres = torch.cartesian_prod(y, x)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(attn: Tensor, distances: Tensor) -> Tensor:
    """Mean distance from a query patch to the patches that it attends to, over all query patches.

    Args:
        attn: Non-negative maps of shape (..., N, N). Patches are the last P tokens; attention to prefix tokens is left
            out, and each row is normalised over the patches.
        distances: Shape (P, P), as from :func:`patch_distances`.

    Returns:
        Shape (...), in the unit of ``distances``: 0 if each patch attends only to itself. A row without any attention
        on patches counts as 0.

    Raises:
        ValueError: If the maps are not square.

    Source: Dosovitskiy et al., arXiv 2010.11929, figure of the mean attention distance by head and depth.
    """
    num_patches = len(distances)
    among = as_maps(attn)[..., -num_patches:, -num_patches:]
    mass = among.sum(dim=-1).clamp_min(torch.finfo(among.dtype).tiny)
    return ((among * distances.to(among)).sum(dim=-1) / mass).mean(dim=-1)


class Distance(Group):
    """Attention distance of the softmax maps, patches only; in Swin's windows it is at most the window's diagonal."""

    name = "distance"
    about = "mean distance in pixels between a patch and what it attends to"
    quantities = {"attention_distance": "mean distance from a patch to those it attends to, patches only (pixels)"}

    def begin(self, images: Tensor, grid: tuple[int, int]) -> None:
        """Keeps the size of the images too."""
        super().begin(images, grid)
        self._size = images.shape[-2:]

    def measure(self, view: LayerView) -> dict[str, Tensor]:
        """Shape (B, num_heads); B counts windows where attention is windowed."""
        layout = self.patch_layout(view)
        if layout is None:
            self.left_out[view.layer.name] = "where its tokens lie on the image is unknown"
            return {}
        height, width = (size / count for size, count in zip(self._size, self.grid_of(view), strict=True))
        maps = view.attention_maps().softmax
        distances = patch_distances(*layout.grid, height, width).to(maps.device, maps.dtype)
        return {"attention_distance": attention_distance(maps, distances)}
