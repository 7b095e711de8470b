"""What a group of quantities is: measured together on one model, layer by layer, chosen by name."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ..probe import LayerView
from ..subject import Subject
from ..values import Values


class Group:
    """Base of all groups. One instance measures one model; what it keeps does not grow with the number of images.

    A new group is one file here, an entry in ``quantities.GROUPS``, and its figures in ``figures.DRAWINGS``.

    Args:
        subject: The model, in evaluation mode.
        patches_only: Whether class, distillation and register tokens are left out of the feature quantities.

    Attributes:
        grid: Rows and columns of patches of the images of the present pass.
        frequencies: Of those quantities whose last axis is a frequency, by layer index and name, in units of pi rad.
        left_out: Block -> why this group, or a part of it, has no numbers there. Shown in the report.
    """

    name: ClassVar[str]
    about: ClassVar[str]  # one line
    quantities: ClassVar[Mapping[str, str]]  # name -> what it is, with its unit
    profiles: ClassVar[frozenset[str]] = frozenset()  # whose last axis is neither heads, channels nor frequencies
    needs_images: ClassVar[bool] = True

    def __init__(self, subject: Subject, patches_only: bool = False) -> None:
        self.subject = subject
        self.patches_only = patches_only
        self.grid = (0, 0)
        self.frequencies: dict[tuple[int, str], list[float]] = {}
        self.left_out: dict[str, str] = {}

    def begin(self, images: Tensor, grid: tuple[int, int]) -> None:
        """Before each forward pass: images (B, 3, H, W), and the rows and columns of their patches."""
        self.grid = grid

    def measure(self, view: LayerView) -> dict[str, Tensor]:
        """As a layer ends: quantities of shape (B, ...), one value or array per image, on Swin's maps per window."""
        return {}

    def finish(self) -> list[dict[str, Values]]:
        """After the last image, for each layer: quantities that are no means over images, such as those of weights."""
        return [{} for _ in self.subject.layers]
