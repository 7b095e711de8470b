"""shears: Pillow's pixels, and timm's draws."""

import pickle
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from torchvision import transforms as v1

import shears

FILL = (124, 116, 104)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with grain, and a white part, as saturated skies have."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels += rng.normal(0, 6, pixels.shape)
    pixels[: height // 3] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pillows(image: Image.Image, matrix: tuple[float, ...], fillcolor: tuple[int, int, int]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fillcolor)


def levels_apart(image: Image.Image, matrix: tuple[float, ...]) -> np.ndarray:
    pillow, ours = (np.asarray(function(image, matrix, FILL)) for function in (pillows, shears.shear))
    return np.abs(pillow.astype(int) - ours)


@pytest.mark.parametrize("size", [(224, 224), (96, 71), (70, 128), (1, 6500)], ids=str)
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_shears_and_translations_are_pillows_to_a_level(size: tuple[int, int], along: str) -> None:
    image = photograph(*size)
    rng = np.random.default_rng(1)
    length = max(size)
    moves = [(factor, 0.0) for factor in (0, *rng.uniform(-0.5, 0.5, 20), -3, 3)]
    moves += [(0.0, offset) for offset in (1, -2, length, -length, 3 * length, 0.5, *rng.uniform(-length, length, 20))]
    moves += [(0.2, 3.7)]
    apart = []
    for factor, offset in moves:
        matrix = (1, factor, offset, 0, 1, 0) if along == "rows" else (1, 0, 0, factor, 1, offset)
        apart.append(levels_apart(image, matrix))
    assert max(each.max() for each in apart) <= 1
    assert np.mean([(each > 0).mean() for each in apart]) < 1e-3


def test_a_move_by_whole_pixels_keeps_every_value() -> None:
    image = photograph(64, 48)
    for offset in (-63, -7, 0, 12, 64):
        assert not levels_apart(image, (1, 0, offset, 0, 1, 0)).any()
        assert not levels_apart(image, (1, 0, 0, 0, 1, offset)).any()


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1, random filter", "rand-m9-n4", "v0", "v0r", "augmix-m5-w2"]
)
def test_timms_policies_draw_the_same_and_give_the_same_pictures(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sheared, shear = [], shears.shear
    monkeypatch.setattr(shears, "shear", lambda *args: sheared.append(args[1]) or shear(*args))
    policy, _, random_filter = policy.partition(",")
    image, draws, pictures = photograph(96, 96), ([], []), ([], [])
    for fast in (False, True):
        transform = policy_of(policy, "random" if random_filter else "bicubic")
        if fast:
            shears.speed_up(transform)
            transform = pickle.loads(pickle.dumps(transform))  # as a worker gets it that is not forked
        for seed in range(60):
            random.seed(seed)
            np.random.seed(seed)
            pictures[fast].append(np.asarray(transform(image)).astype(int))
            draws[fast].append((random.random(), np.random.random()))
    assert len(sheared) > 4
    assert draws[False] == draws[True]
    apart = [np.abs(plain - fast) for plain, fast in zip(*pictures, strict=True)]
    # Operations that follow may turn one level into several: equalize, posterize.
    assert np.mean([(each > 0).mean() for each in apart]) < 2e-3
    assert np.median([each.max() for each in apart]) <= 1


def policy_of(policy: str, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    augment = create_transform(96, is_training=True, auto_augment=policy, interpolation=interpolation, separate=True)[1]
    return augment.transforms[0]


def test_other_interpolations_small_images_and_other_modes_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shears, "shear", None)
    other, bicubic = (Image.Resampling.BILINEAR, Image.Resampling.NEAREST), Image.Resampling.BICUBIC
    large, small = photograph(96, 96), photograph(64, 64)
    for image, resample in ((large, other[0]), (large, other[1]), (small, bicubic), (large.convert("L"), bicubic)):
        operation = AugmentOp("ShearX", 1, 9, dict(interpolation=resample, img_mean=FILL if image.mode == "RGB" else 3))
        pictures = []
        for fast in (False, True):
            random.seed(3)
            if fast:
                monkeypatch.setattr(operation, "aug_fn", partial(shears._with_shears, operation.aug_fn))
            pictures.append(np.asarray(operation(image)))
        assert np.array_equal(*pictures)


@pytest.mark.parametrize("other", [v1.AutoAugment(), v1.RandomHorizontalFlip(), policy_of("3a", "bicubic")], ids=repr)
def test_other_transforms_stay_as_they_are(other: Callable) -> None:
    before = pickle.dumps(other)
    shears.speed_up(other)
    assert pickle.dumps(other) == before


def test_a_shear_takes_less_time_than_pillows() -> None:
    image, matrix, times = photograph(224, 224), (1, 0.25, 0, 0, 1, 0), ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's worker
    try:
        for _ in range(40):
            for function, spent in zip((shears.shear, pillows), times, strict=True):
                began = time.process_time()
                function(image, matrix, FILL)
                spent.append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(times[0]) < 0.75 * statistics.median(times[1])  # a sixth on a quiet machine
