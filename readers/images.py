"""Image files: opened in a few formats, within limits, and decoded as RGB."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from . import archives
from .archives import DataError, Member
from .files import read_file

# Formats that are opened, whatever a file's extension: those of torchvision's extensions, and others that such files
# turn out to have. Pillow knows 40 more; some start a program (EPS) or fail in ways of their own.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MAX_ASPECT = 100  # of the longer side to the shorter, which an evaluation resizes to 256 pixels
# Pillow's own limit for a picture is 179 million pixels, 1.4 GB while it is converted. Above PLAIN_PIXELS, only a file
# made to exhaust memory has more than PIXELS_A_BYTE pixels a byte.
PLAIN_PIXELS, PIXELS_A_BYTE = 1 << 24, 1000
File = str | Member
# The end of a sentence; commands that do not train lack the flag.
OR_SKIP = ", or pass --skip-bad-images N to skip up to N such training images"


class BadImageError(DataError):
    """One image file cannot be read."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any Pillow mode to 8-bit RGB, dropping transparency.

    Args:
        image: Image in any mode; 16-bit grey values are scaled to 8 bit, where Pillow alone would clip them to white.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def load_image(path: File) -> Image.Image:
    """Reads an image file as RGB.

    Args:
        path: File of one of ``IMAGE_FORMATS``, on disk or in an archive.

    Raises:
        BadImageError: If the file cannot be read.
    """
    return decode(open_image(path))


def open_image(path: File) -> Image.Image:
    """Reads the head of an image file: its size is known, its pixels are decoded when they are needed.

    Raises:
        BadImageError: If the file cannot be read.
    """
    with _explain_image_errors(path):
        content = read_file(path) if isinstance(path, str) else path.read()
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        image.filename = str(path)  # named by errors while decoding
        if image.format == "JPEG":
            image.decodermaxblock = max(image.decodermaxblock, len(content))  # decoded at once, not in blocks of 64 kB
        shorter, longer = sorted(image.size)
        if longer > MAX_ASPECT * shorter:
            raise ValueError(f"it has {image.size[0]} x {image.size[1]} pixels, more than {MAX_ASPECT} to 1")
        if shorter * longer > max(PLAIN_PIXELS, PIXELS_A_BYTE * len(content)):
            raise ValueError(f"{len(content)} bytes declare {image.size[0]} x {image.size[1]} pixels")
        return image


def decode(image: Image.Image) -> Image.Image:
    """Decodes an image from :func:`open_image` to RGB and closes its file; a decoded image is only converted.

    Raises:
        BadImageError: If the file cannot be decoded.
    """
    with _explain_image_errors(getattr(image, "filename", "")), image:
        image.load()
        return to_rgb(image)


@contextmanager
def _explain_image_errors(path: File) -> Iterator[None]:
    with warnings.catch_warnings():
        # Broken EXIF blocks and odd TIFF tags do not touch the pixels, and ImageNet has hundreds of them.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image has its own limits
        try:
            yield
        except MemoryError:  # not the file's fault: sizes are limited
            raise
        except Exception as error:  # on damaged files the decoders fail in any way
            raise BadImageError(
                f"cannot read image {archives.shown(path)} ({archives.brief(error)}): repair or remove it{OR_SKIP}"
            ) from error
