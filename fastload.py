"""The fast path from image files to training batches: the plain path's draws and images, with less work for the CPU.

``datasets.build_transform`` decodes whole files, resizes with Pillow and hands normalised floats from process to
process. Here, with the same draws in the same order:

- a crop is drawn before its file is decoded, and large JPEG files are decoded at the scale that the crop needs;
- an image that repeated augmentation takes several times in a row is decoded once;
- the crop is resized by torch's 8-bit kernel, five times as fast as Pillow and with the same antialiasing filter: of
  1,000 values about four differ, by one of 255 levels;
- RandAugment's shears and translations take a fifth to an eighth of Pillow's time (``shears.py``): of 10,000 values
  about two differ, by one level;
- images travel to the device as bytes, in a quarter of the memory; ``DeviceTransform`` normalises them there (on a CPU
  to the bit as ``ToTensor`` and ``Normalize`` do) and erases rectangles.

So an image equals the plain path's except for those levels. Only the erased rectangles are drawn from another stream,
the step's instead of the sample's. It, too, does not depend on workers and restarts.

Evaluation images are cropped and resized by Pillow, as in the plain path, and also travel as bytes: on a CPU their
values are the plain path's to the bit.
"""

import math
import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

import datasets
import shears
from datasets import DataOptions
from readers.images import File, decode, open_image

# An image decoded at reduced scale has at least this many pixels for each one of the result, along both sides. With 2
# the result is within 0.6 levels of full decoding on average and as sharp (1%); with 1 it loses up to 5% of its
# gradients.
REDUCING_GAP = 2
TORCH_FILTERS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)


class LastImage:
    """Opens and decodes image files, and keeps the last one's pixels for the case that the same file comes again.

    Repeated augmentation deals the copies of an image out to the processes in turn: one process gets all three in a
    row, two processes two of them every other time, more processes none. With remote shards and ``LocalRASampler``
    one process always gets all three.
    """

    def __init__(self) -> None:
        self.path: File | None = None
        self.image: Image.Image | None = None
        self.decoded = False

    def open(self, path: File) -> Image.Image:
        """As ``readers.images.open_image``."""
        if path != self.path or not self.decoded:
            self.image, self.path, self.decoded = open_image(path), path, False
        return self.image

    def __call__(self, image: Image.Image) -> Image.Image:
        """As ``readers.images.decode``, for an image at its full size."""
        pixels = decode(image)
        self.decoded = image is self.image
        return pixels


class RandomResizedCropOfFile(RandomResizedCropAndInterpolation):
    """timm's random crop for images that are not decoded yet; its draws are the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last = LastImage()

    def __call__(self, image: Image.Image) -> Image.Image:
        """Draws a crop, decodes, and resizes the crop.

        Args:
            image: Of any mode and size; an opened file is decoded here.

        Returns:
            RGB image of ``self.size``.

        Raises:
            BadImageError: If the file cannot be decoded.
        """
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        several = isinstance(self.interpolation, tuple)
        interpolation = random.choice(self.interpolation) if several else self.interpolation
        reduction = self._reduction(width, height)
        box = (left, top, left + width, top + height)
        # A file so large that some of its crops are decoded at a reduced scale is not kept: what came before would
        # decide which of its pixels a crop gets.
        decode_whole = self.last if self._reduction(*image.size) < 2 else decode
        if reduction >= 2 and (scale := _reduce(image, reduction)) < 1:
            # The crop's border lies within reduced pixels; only Pillow's resize takes such a box.
            box = tuple(scale * edge for edge in box)
            return decode(image).resize(self.size[::-1], str_to_pil_interp(interpolation.value), box=box)
        crop = decode_whole(image).crop(box)
        if not width * height:  # of an image of one or two pixels; black, as in the plain path
            return Image.new("RGB", self.size[::-1])
        # Pillow keeps four bytes a pixel. To copy them as they are is faster than to pick three, and torch's resize is
        # as fast with four.
        pixels = torch.frombuffer(bytearray(crop.tobytes("raw", "RGBX")), dtype=torch.uint8).view(height, width, 4)
        resized = functional.resize(pixels.permute(2, 0, 1), self.size, interpolation, antialias=True)
        return Image.frombytes("RGB", self.size[::-1], resized.permute(1, 2, 0).numpy(), "raw", "RGBX")

    def _reduction(self, width: int, height: int) -> float:
        """How many times smaller an area may be decoded."""
        return min(height / self.size[0], width / self.size[1]) / REDUCING_GAP


def _reduce(image: Image.Image, reduction: float) -> float:
    """Lets a JPEG file be decoded at 1/2, 1/4 or 1/8, at most ``reduction`` times smaller; returns that scale."""
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width / reduction), math.ceil(height / reduction)))
    return 1.0 if drafted is None else drafted[1][2] / width


def build_transform(options: DataOptions, data_config: dict[str, Any] | None = None) -> transforms.Compose:
    """As ``datasets.build_transform(True, ...)`` up to normalisation, from an image that may not be decoded yet.

    Returns:
        Transform to a tensor of shape (input_size, input_size, 3), uint8: transposing is left to the device too.
    """
    transform = datasets.build_transform(True, options, data_config, as_image=True)
    transform.transforms.append(_to_bytes)
    for step in transform.transforms:
        shears.speed_up(step)
    first = transform.transforms[0]
    modes = getattr(first, "interpolation", None)
    modes = modes if isinstance(modes, tuple) else (modes,)
    if isinstance(first, RandomResizedCropAndInterpolation) and set(modes) <= set(TORCH_FILTERS):
        transform.transforms[0] = RandomResizedCropOfFile(
            first.size, first.scale, first.ratio, options.train_interpolation
        )
    else:
        transform.transforms.insert(0, LastImage())
    return transform


def build_eval_transform(options: DataOptions, data_config: dict[str, Any] | None = None) -> transforms.Compose:
    """``datasets.build_transform(False, ...)`` up to normalisation, with the same result as :func:`build_transform`."""
    transform = datasets.build_transform(False, options, data_config, as_image=True)
    transform.transforms.append(_to_bytes)
    return transform


def _to_bytes(image: Image.Image) -> Tensor:
    """Pixels of shape (H, W, 3), uint8."""
    return torch.from_numpy(np.array(image))


def build_dataset(options: DataOptions, data_config: dict[str, Any] | None = None) -> tuple[Dataset, int]:
    """Training data set of uint8 images, and its number of classes; otherwise as ``datasets.build_dataset``."""
    transform = build_transform(options, data_config)
    first = transform.transforms[0]
    last = first if isinstance(first, LastImage) else first.last
    return datasets.build_dataset(True, options, data_config, transform=transform, loader=last.open)


class DeviceTransform(nn.Module):
    """The rest of the transform, on batches: normalises bytes and, for training, erases rectangles.

    Erasing draws from Python's generator and the device's own, both seeded for the step.

    Args:
        mean: Of each channel, for values in [0, 1].
        std: Likewise.
        reprob: Probability that an image is erased at all.
        remode: What is written, after normalisation: ``const`` (0), ``rand`` (a normal colour) or ``pixel`` (normal
            noise).
        recount: Largest number of rectangles.
        device: Where the batches are.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        reprob: float,
        remode: str,
        recount: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, device=device).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, device=device).view(-1, 1, 1))
        self.erase = RandomErasing(reprob, mode=remode, max_count=recount, device=device) if reprob else None

    def forward(self, images: Tensor) -> Tensor:
        """Maps uint8 of shape (B, H, W, 3) to normalised float32 of shape (B, 3, H, W)."""
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        images = images.div_(255).sub_(self.mean).div_(self.std)
        return images if self.erase is None else self.erase(images)


def build_device_transform(
    options: DataOptions,
    data_config: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    *,
    is_train: bool = True,
) -> DeviceTransform:
    """What ``build_transform`` or ``build_eval_transform`` leaves to the device; the arguments are the same."""
    config = data_config or resolve_data_config(
        pretrained_cfg={"input_size": (3, options.input_size, options.input_size)}
    )
    return DeviceTransform(
        config["mean"],
        config["std"],
        reprob=options.reprob if is_train else 0,
        remode=options.remode,
        recount=options.recount,
        device=torch.device(device),
    )
