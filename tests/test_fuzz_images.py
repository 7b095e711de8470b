"""Damaged images: each is read as RGB or is a ``BadImageError``, in time, without a signal or a flood of memory."""

import io
import itertools
import random
import struct
import zlib

import numpy as np
import pytest
from fuzzing import CASES, SCALE, damage, in_time, watched
from PIL import Image

import fastload
from readers.images import BadImageError, load_image, open_image

FORMATS = [
    *((mode, "JPEG", options) for mode in ("RGB", "L", "CMYK") for options in ({}, {"progressive": True})),
    *((mode, "PNG", {}) for mode in ("RGB", "RGBA", "P", "1", "I;16", "LA")),
    *((mode, "WEBP", {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (True, False)),
    *((mode, "BMP", {}) for mode in ("RGB", "P", "1")),
    *((mode, "PPM", {}) for mode in ("RGB", "L", "1")),
    *(("RGB", "TIFF", {"compression": kind}) for kind in (None, "tiff_lzw", "jpeg", "tiff_deflate", "packbits")),
    *((mode, "TIFF", {}) for mode in ("I;16", "F", "CMYK", "1")),
    ("P", "GIF", {}),
    ("RGB", "JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
]


class InMemory:
    """Takes the place of a file: reading is the only thing that is asked of it."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self) -> bytes:
        return self.content


def encode(mode: str, kind: str, options: dict, size: tuple[int, int] = (26, 19)) -> bytes:
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    with io.BytesIO() as buffer:
        image.save(buffer, kind, **options)
        return buffer.getvalue()


def read(content: bytes, fast: bool) -> bool:
    """Whether it can be read; by the fast loader's way, which asks a JPEG for a reduced picture, or the plain one."""
    try:
        if fast:
            crop = fastload.RandomResizedCropOfFile((4, 4), (0.5, 1.0), (0.75, 1.3), "bicubic")
            image = crop(open_image(InMemory(content)))
        else:
            image = load_image(InMemory(content))
    except BadImageError as error:
        assert str(error).isprintable() and "pass --skip-bad-images N" in str(error)
        return False
    assert image.mode == "RGB" and min(image.size) > 0
    return True


def test_damaged_images_are_images_or_bad_images() -> None:
    rng = random.Random(SCALE)
    sources = [encode(*entry) for entry in FORMATS]
    assert all(read(content, fast) for content in sources for fast in (False, True))
    outcomes = []
    with watched():
        for case, content in zip(range(CASES), itertools.cycle(sources)):
            with in_time(case):
                outcomes.append(read(damage(rng, content), fast=bool(rng.getrandbits(1))))
    assert 0.1 < np.mean(outcomes) < 0.9  # neither all is refused nor all is taken


def test_only_known_formats_are_opened_whatever_a_file_is_called() -> None:
    """PostScript would start a program; the others fail in ways of their own when they are damaged."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
    others = [postscript]
    for kind in ("AVIF", "DDS", "TGA", "ICO", "JPEG2000", "PCX", "SGI", "IM", "PDF"):
        if kind in Image.SAVE or Image.init() and kind in Image.SAVE:
            others.append(encode("RGB", kind, {}))
    assert len(others) > 6
    for content in others:
        with pytest.raises(BadImageError, match="UnidentifiedImageError"):
            load_image(InMemory(content))


def bomb(width: int, height: int) -> bytes:
    """A small PNG that declares any size."""
    plain = encode("L", "PNG", {}, (8, 8))
    header = bytearray(plain[12:29])
    header[4:12] = struct.pack(">II", width, height)
    return plain[:12] + bytes(header) + struct.pack(">I", zlib.crc32(header)) + plain[33:]


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (10_000, 1, "10000 x 1 pixels, more than 100 to 1"),
        (1, 10_000, "1 x 10000 pixels"),
        (50_000, 50_000, "DecompressionBombError"),
        (2**31 - 1, 2**31 - 1, "cannot read image"),
        (0, 0, "cannot read image"),
    ],
)
def test_sizes_beyond_reason_are_refused_before_anything_is_decoded(width: int, height: int, message: str) -> None:
    with watched(), pytest.raises(BadImageError, match=message):
        load_image(InMemory(bomb(width, height)))
