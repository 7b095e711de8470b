"""Shears and translations of images: Pillow's values in a fifth to an eighth of its time at 224x224.

Pillow's bicubic ``Image.transform`` weighs 4 x 4 pixels for each pixel, in double precision; RandAugment spends most of
its time there. But a shear or a translation moves each row, or each column, by one distance: four pixels of that row
are left, with the same four weights for all of it.

The kernel is Pillow's, cubic convolution with ``a = -1``, borders included. In single precision, and rounded down as
Pillow does, about 2 values of 10,000 are one of 255 levels off. They are more, still by one level, where a distance is
a whole number but for rounding: a translation of an image of 200 or 400 pixels by 72 or 144, but of none of 224.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

SMALL = 80 * 80  # pixels of an image up to which Pillow is as fast
OPERATIONS = (
    auto_augment.shear_x,
    auto_augment.shear_y,
    auto_augment.translate_x_abs,
    auto_augment.translate_x_rel,
    auto_augment.translate_y_abs,
    auto_augment.translate_y_rel,
)


def speed_up(augmentation: Any) -> None:
    """Lets timm's RandAugment, AutoAugment or AugMix use :func:`shear` where that is faster; their draws stay.

    Args:
        augmentation: Any transform; others than these three stay as they are.
    """
    if isinstance(augmentation, auto_augment.RandAugment | auto_augment.AugMixAugment):
        operations = augmentation.ops
    elif isinstance(augmentation, auto_augment.AutoAugment):
        operations = chain.from_iterable(augmentation.policy)
    else:
        return
    for operation in operations:
        if operation.aug_fn in OPERATIONS:
            operation.aug_fn = partial(_with_shears, operation.aug_fn)


def _with_shears(function: Callable[..., Image.Image], image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
    return function(_Sheared(image), *args, **kwargs)


class _Sheared:
    """Stands in for an image in timm's ``OPERATIONS``, which ask for its size and transform it."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.size = image, image.size

    def transform(
        self,
        size: tuple[int, int],
        method: Image.Transform,
        data: tuple[float, ...],
        resample: Image.Resampling,
        fillcolor: tuple[int, int, int],
    ) -> Image.Image:
        """As Pillow's ``Image.transform``."""
        large = self.image.width * self.image.height > SMALL
        if large and resample == Image.Resampling.BICUBIC and self.image.mode == "RGB":
            return shear(self.image, data, fillcolor)
        return self.image.transform(size, method, data, resample=resample, fillcolor=fillcolor)


def shear(image: Image.Image, matrix: tuple[float, ...], fillcolor: tuple[int, int, int]) -> Image.Image:
    """Pillow's ``image.transform(image.size, AFFINE, matrix, BICUBIC, fillcolor=fillcolor)``.

    Args:
        image: RGB.
        matrix: ``(1, a, b, 0, 1, 0)`` takes pixel (x, y) from (x + a (y + 1/2) + b, y); ``(1, 0, 0, a, 1, b)`` from
            (x, y + a (x + 1/2) + b).
        fillcolor: Of pixels that come from outside of the image.
    """
    _, x_per_y, x_offset, y_per_x, _, y_offset = matrix
    if (y_per_x, y_offset) == (0, 0):
        return Image.fromarray(_move_rows(np.asarray(image), x_per_y, x_offset, fillcolor))
    if y_per_x == 0:
        return Image.fromarray(_move_down(np.asarray(image), y_offset, fillcolor))
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    moved = Image.fromarray(_move_rows(np.asarray(turned), y_per_x, y_offset, fillcolor))
    return moved.transpose(Image.Transpose.TRANSPOSE)


def _move_down(pixels: np.ndarray, distance: float, fillcolor: tuple[int, int, int]) -> np.ndarray:
    """Takes row y from row ``y + distance``; pixels are (H, W, 3), uint8."""
    height = len(pixels)
    whole = math.floor(distance)
    rows = (np.arange(-1, height + 2) + whole).clip(0, height - 1)
    moved = _between(torch.from_numpy(pixels[rows]).float(), torch.tensor(distance - whole).float(), 0)
    first, last = (min(max(math.ceil(edge - distance - 0.5), 0), height) for edge in (0, height))
    moved[:first] = moved[last:] = fillcolor
    return moved


def _move_rows(pixels: np.ndarray, factor: float, offset: float, fillcolor: tuple[int, int, int]) -> np.ndarray:
    """Takes column x of row y from column ``x + factor (y + 1/2) + offset``; pixels are (H, W, 3), uint8."""
    height, width, _ = pixels.shape
    distances = factor * (np.arange(height) + 0.5) + offset
    whole = np.floor(distances)
    fractions = torch.from_numpy(distances - whole).float().view(height, 1, 1)

    # One gather takes a window of each row: its pixels' sources, the column before and the two behind. All rows lie one
    # after the other, and repeat their first and last pixel twice. A window may reach into neighbouring rows: those
    # pixels lie outside of the image, and get the fillcolor below. ``guard`` is how far windows of the first and last
    # row reach, which begin at most a width away: a row that moves further is all fillcolor.
    border, guard = 2, width + 3
    padded = np.empty((height * (width + 2 * border) + 2 * guard, 3), np.uint8)
    lines = padded[guard:-guard].reshape(height, -1, 3)
    lines[:, :border], lines[:, border:-border], lines[:, -border:] = pixels[:, :1], pixels, pixels[:, -1:]
    starts = guard + np.arange(height) * lines.shape[1] + border - 1 + whole.clip(-width, width).astype(np.intp)
    windows = np.lib.stride_tricks.sliding_window_view(padded.reshape(-1), 3 * (width + 3))
    rows = windows[3 * starts].reshape(height, -1, 3)
    moved = _between(torch.from_numpy(rows).float(), fractions, 1)

    fill = np.array(fillcolor, np.uint8)
    first, last = (np.ceil(edge - distances - 0.5).clip(0, width).astype(np.intp) for edge in (0, width))
    for top, bottom in _runs(first):
        moved[top:bottom, : first[top]] = fill
    for top, bottom in _runs(last):
        moved[top:bottom, last[top] :] = fill
    return moved


def _between(pixels: Tensor, fractions: Tensor, axis: int) -> np.ndarray:
    """Cubic convolution along an axis: the values ``fractions`` behind the second to the third last of its places.

    Args:
        pixels: (H, W, 3), float32.
        fractions: In [0, 1], broadcastable to ``pixels``.
        axis: 0 or 1.

    Returns:
        uint8, shorter than ``pixels`` by three along the axis.
    """
    length = pixels.shape[axis] - 3
    # Written with the differences between neighbours, the kernel keeps equal pixels exactly as they are.
    steps = pixels.narrow(axis, 1, length + 2) - pixels.narrow(axis, 0, length + 2)
    before, step, behind = (steps.narrow(axis, i, length) for i in range(3))
    rest = 1 - fractions
    moved = torch.addcmul(pixels.narrow(axis, 1, length), before, fractions * rest * rest)
    moved.addcmul_(step, fractions).addcmul_(behind, -fractions * fractions * rest)
    return moved.clamp_(0, 255).numpy().astype(np.uint8)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    return zip([0, *edges], [*edges, len(values)], strict=True)
