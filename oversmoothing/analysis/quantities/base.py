"""Groups of quantities: measured together on one model, layer by layer, and chosen by name."""

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor

from ..probe import LayerView
from ..subject import Subject
from ..values import Values


class PatchLayout(NamedTuple):
    """Positions of the tokens in a layer's maps: ``prefix`` tokens first, then the patches of a grid, row by row."""

    grid: tuple[int, int]  # rows and columns, of the whole image or of one window
    prefix: int
    is_window: bool


class Group:
    """Base of all groups. One instance measures one model; its memory does not grow with the number of images.

    A new group is one file here, an entry in ``quantities.GROUPS``, and its figures in ``figures.DRAWINGS``.

    Args:
        subject: The model, in evaluation mode.
        patches_only: Whether class, distillation and register tokens are left out of the feature quantities.

    Attributes:
        grid: Rows and columns of patches of the images in the present forward pass.
        frequencies: (layer index, name) -> frequencies along the last axis, in units of pi rad, for quantities with
            such an axis.
        left_out: Block -> why this group, or a part of it, has no numbers there. Shown in the report.
    """

    name: ClassVar[str]
    about: ClassVar[str]  # one line
    quantities: ClassVar[Mapping[str, str]]  # name -> what it is, with its unit
    profiles: ClassVar[frozenset[str]] = frozenset()  # last axis: neither heads, channels nor frequencies
    needs_images: ClassVar[bool] = True
    image_map: ClassVar[str] = ""  # description of ``over_image``'s map, with its unit; empty without such a map

    def __init__(self, subject: Subject, patches_only: bool = False) -> None:
        self.subject = subject
        self.patches_only = patches_only
        self.grid = (0, 0)
        self.frequencies: dict[tuple[int, str], list[float]] = {}
        self.left_out: dict[str, str] = {}

    def begin(self, images: Tensor, grid: tuple[int, int]) -> None:
        """Called before each forward pass, with images (B, 3, H, W) and the rows and columns of their patches."""
        self.grid = grid

    def measure(self, view: LayerView) -> dict[str, Tensor]:
        """Called as a layer ends: quantities of shape (B, ...), one value or array per image (Swin's maps: window)."""
        return {}

    def over_image(self, view: LayerView) -> Tensor | None:
        """Called as a layer ends, with one image: a map over its grid, (rows, columns), or None."""
        return None

    def grid_of(self, view: LayerView) -> tuple[int, int]:
        """Rows and columns of patches at this layer: those of its output if that is a feature map, else the model's."""
        return view.grid or self.grid

    def patch_layout(self, view: LayerView) -> PatchLayout | None:
        """Positions on the image of the tokens in the layer's maps; None if they are unknown."""
        kind, n = view.layer.kind, view.heads().k.shape[-2]
        if not kind.raster:
            return None
        if kind.windowed and (window := kind.window_grid(view.layer.attn)) is not None:
            return PatchLayout(tuple(window), 0, True) if math.prod(window) == n else None
        grid = self.grid_of(view)
        prefix = n - math.prod(grid)
        is_whole = prefix == 0 if view.grid is not None or kind.windowed else prefix >= 0
        return PatchLayout(grid, prefix, False) if is_whole else None

    def finish(self) -> list[dict[str, Values]]:
        """Called after the last image: for each layer, quantities that are not means over images (weights)."""
        return [{} for _ in self.subject.layers]
