"""Data sets, transforms and loading: recipe, labels, errors, and samples that do not depend on the workers."""

import errno
import gzip
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import chisquare, kstest, uniform
from timm.data import resolve_data_config
from torchvision import transforms

import readers.loader
from datasets import NOMINAL_CLASSES, DataError, DataOptions, build_dataset, build_transform, count_classes
from options import get_args_parser
from readers.images import load_image, to_rgb
from readers.loader import AddressedDataset, build_loader, explain_loader_errors, start_workers
from samplers import build_samplers

DEIT = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875, "interpolation": "bicubic"}
CAIT = DEIT | {"crop_pct": 1.0}


def make_args(path: Path | str = "", **kwargs: object) -> DataOptions:
    """DeiT's defaults."""
    return DataOptions(**({"data_set": "FOLDER", "data_path": str(path)} | kwargs))


def random_image(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


# A machine with fewer cores than a test has workers is no problem here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes of four training and two validation images each."""
    for split, number in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog", "eel")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(number):
                random_image(10 * label + i).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("input_size", "config", "ratio", "resize"),
    [
        (224, DEIT, None, 256),
        (224, CAIT, None, 224),
        (384, CAIT, None, 384),
        (384, DEIT, None, 438),
        (224, CAIT, 0.875, 256),
        (224, DEIT, 1.0, 224),
        (32, DEIT, None, 32),
        (28, DEIT, 0.5, 28),
    ],
)
def test_evaluation_resizes_by_the_models_own_crop_ratio(
    input_size: int, config: dict, ratio: float | None, resize: int
) -> None:
    transform = build_transform(False, make_args(input_size=input_size, eval_crop_ratio=ratio), config)
    first, second = transform.transforms[:2]
    assert isinstance(first, transforms.Resize) and first.size == resize
    assert first.interpolation == transforms.InterpolationMode.BICUBIC
    assert isinstance(second, transforms.CenterCrop) and tuple(second.size) == (input_size, input_size)
    assert transform(random_image(0, (300, 500))).shape == (3, input_size, input_size)


def test_evaluation_equals_deits_transform() -> None:
    image = random_image(0, (300, 500))
    expected = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(DEIT["mean"], DEIT["std"]),
        ]
    )(image)
    torch.testing.assert_close(build_transform(False, make_args(), DEIT)(image), expected, rtol=0, atol=1e-6)
    # Without a data config the values are ImageNet's.
    torch.testing.assert_close(build_transform(False, make_args())(image), expected, rtol=0, atol=1e-6)


def test_timms_data_configs_are_read() -> None:
    config = resolve_data_config({}, pretrained_cfg={"input_size": (3, 224, 224), "crop_pct": 1.0, "mean": (0.5,) * 3})
    transform = build_transform(False, make_args(), config)
    assert transform.transforms[0].size == 224
    assert transform.transforms[-1].mean.tolist() == [0.5] * 3


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_impossible_crop_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(DataError, match="--eval-crop-ratio"):
        build_transform(False, make_args(eval_crop_ratio=ratio), DEIT)


def test_training_follows_deits_recipe() -> None:
    steps = build_transform(True, make_args(), DEIT).transforms
    names = [type(step).__name__ for step in steps]
    assert names == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    assert steps[0].scale == (0.08, 1.0)
    assert steps[-1].probability == 0.25


@pytest.mark.parametrize("aa", ["none", "None", "NONE", "", None])
def test_aa_none_switches_over_to_color_jitter(aa: str | None) -> None:
    transform = build_transform(True, make_args(aa=aa), DEIT)
    names = [type(step).__name__ for step in transform.transforms]
    assert "ColorJitter" in names and "RandAugment" not in names
    assert transform(random_image(0)).shape == (3, 224, 224)


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "original", "originalr", "v0", "v0r", "3a", "augmix-m3-w3"])
def test_policies_of_timm_work(aa: str) -> None:
    assert build_transform(True, make_args(aa=aa, input_size=64), DEIT)(random_image(0)).shape == (3, 64, 64)


def test_three_augment_takes_the_place_of_the_policy_and_color_jitter_follows() -> None:
    steps = build_transform(True, make_args(three_augment=True, color_jitter=0.3, reprob=0.0), DEIT).transforms
    crop, flip, three, jitter, *rest = steps
    assert [type(step).__name__ for step in rest] == ["MaybeToTensor", "Normalize"]
    assert (crop.scale, crop.ratio, flip.p) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert len(three.policy) == 3
    assert jitter.brightness == jitter.contrast == jitter.saturation == pytest.approx((0.7, 1.3)) and not jitter.hue


def test_each_image_is_grey_solarised_or_blurred_alike_often() -> None:
    """ThreeAugment as torchvision's Grayscale and Pillow's solarize and GaussianBlur have it, of radius 0.1 to 2."""
    three = build_transform(True, make_args(three_augment=True), DEIT).transforms[2]
    image = random_image(0)
    counts, radii = [0, 0, 0], []
    for seed in range(900):
        random.seed(seed)
        result = np.asarray(three(image))
        random.seed(seed)
        random.choice(range(3))
        radius = random.uniform(0.1, 2.0)
        blurred = image.filter(ImageFilter.GaussianBlur(radius))
        whole = (transforms.Grayscale(3)(image), ImageOps.solarize(image), blurred)
        (which,) = [i for i, expected in enumerate(whole) if np.array_equal(result, expected)]
        counts[which] += 1
        radii += [radius] if which == 2 else []
    assert chisquare(counts).pvalue > 0.05, counts
    assert kstest(radii, uniform(0.1, 1.9).cdf).pvalue > 0.05


@pytest.mark.parametrize("side", [24, 40])
@pytest.mark.parametrize("size", [(50, 90), (90, 50), (20, 20)])
def test_the_simple_crop_is_any_square_of_the_resized_image_and_four_reflected_pixels(
    side: int, size: tuple[int, int]
) -> None:
    options = make_args(input_size=side, src=True, aa="none", color_jitter=0.0, hflip=0.0)
    transform = build_transform(True, options, DEIT, as_image=True)
    image = random_image(1, size)
    scale = side / min(size)
    shape = tuple(int(scale * edge) for edge in size)
    resized = np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC))
    padded = np.pad(resized, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    rows, columns = (range(edge + 8 - side + 1) for edge in shape)
    windows = {padded[y : y + side, x : x + side].tobytes(): (y, x) for y in rows for x in columns}
    torch.manual_seed(0)
    places = [windows[np.asarray(transform(image)).tobytes()] for _ in range(400)]
    assert {y for y, _ in places} == set(rows) and {x for _, x in places} == set(columns)


def test_the_simple_crop_stands_before_either_augmentation() -> None:
    names = {"RandAugment": {}, "AutoAugment": {"three_augment": True}, "ColorJitter": {"aa": "none"}}
    for name, options in names.items():
        steps = build_transform(True, make_args(src=True, **options), DEIT).transforms
        found = [type(step).__name__ for step in steps]
        assert found[:4] == ["Resize", "RandomCrop", "RandomHorizontalFlip", name]
        assert steps[0].interpolation == transforms.InterpolationMode.BICUBIC and steps[2].p == 0.5


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(DataError, match="--aa 'off'"):
        build_transform(True, make_args(aa="off"), DEIT)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (28, 28), (50, 70)])
def test_small_inputs_are_cropped_with_padding(size: tuple[int, int]) -> None:
    transform = build_transform(True, make_args(input_size=32), DEIT)
    crop = transform.transforms[1]
    assert isinstance(crop, transforms.RandomCrop) and crop.padding == 4
    assert not any(type(step).__name__.startswith("RandomResizedCrop") for step in transform.transforms)
    assert transform(random_image(0, size)).shape == (3, 32, 32)
    assert build_transform(False, make_args(input_size=32), DEIT)(random_image(0, size)).shape == (3, 32, 32)


def augment_many(number: int) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    transform = build_transform(True, make_args(), DEIT)
    images = [random_image(i, (32, 32)) for i in range(20)]
    for i in range(number):
        tensor = transform(images[i % len(images)])
        assert tensor.shape == (3, 224, 224) and bool(tensor.isfinite().all()), f"image {i}"


def test_hundreds_of_images_pass_the_default_recipe() -> None:
    augment_many(300)


@pytest.mark.slow
def test_thousands_of_images_pass_the_default_recipe() -> None:
    # RandAugment draws a 0-bit posterize about once in a few hundred images, which Pillow 13.0 refuses.
    augment_many(4_000)


# --------------------------------------------------------------------------------------------------------- image files


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "png"),
        ("L", "jpg"),
        ("LA", "png"),
        ("P", "png"),
        ("P", "bmp"),
        ("RGB", "webp"),
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("I;16", "png"),
        ("I;16", "tif"),
        ("F", "tiff"),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (30, 20)])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str, size: tuple[int, int]) -> None:
    path = tmp_path / f"image.{suffix}"
    coloured = mode in ("P", "RGB", "RGBA", "CMYK")
    (Image.new("RGB", size, "red").convert(mode) if coloured else Image.new(mode, size)).save(path)
    image = load_image(str(path))
    assert image.mode == "RGB" and image.size == size
    if coloured:
        np.testing.assert_allclose(np.asarray(image)[0, 0], (254, 0, 0), atol=2)
    assert build_transform(False, make_args(input_size=64), DEIT)(image).shape == (3, 64, 64)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_palette_transparency_and_broken_exif_do_not_warn(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = b"\x00" * 256
    palette.save(tmp_path / "palette.png", transparency=b"\x00" * 256)
    random_image(0).save(tmp_path / "exif.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\x00\x12\x01\x03\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("palette.png", "exif.jpg"):
            assert load_image(str(tmp_path / name)).mode == "RGB"


def break_image(path: Path, how: str) -> None:
    """Damages a file in the ways that data sets on disk are damaged."""
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"<html>404</html>"}[how])


@pytest.mark.parametrize(
    ("how", "num_workers"),
    [("empty", 0), ("truncated", 0), ("text", 0), pytest.param("truncated", 1, marks=pytest.mark.slow)],
)
def test_unreadable_image_is_named_also_from_a_worker(tree: Path, how: str, num_workers: int) -> None:
    victim = tree / "val" / "dog" / "1.png"
    break_image(victim, how)
    args = make_args(tree, input_size=32)
    train, _ = build_dataset(True, args)
    val, _ = build_dataset(False, args)
    _, sampler = build_samplers(train, val, world_size=1, rank=0, repeated_aug=False, seed=0)
    loader = build_loader(val, sampler, batch_size=2, num_workers=num_workers, pin_memory=False, drop_last=False)
    with pytest.raises(DataError, match=f"cannot read image {victim}") as error:
        list(loader)
    assert "--skip-bad-images" in str(error.value)


# ------------------------------------------------------------------------------------------------------ bad images


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_bad_images_are_replaced_by_the_next_sample_whatever_the_workers(tree: Path, num_workers: int) -> None:
    for name in ("cat/1.png", "cat/2.png", "eel/3.png"):
        break_image(tree / "train" / name, "truncated")
    dataset, _ = build_dataset(True, make_args(tree, input_size=32, skip_bad_images=3))
    keys = [(index, 7 * index) for index in range(12)]
    loader = torch.utils.data.DataLoader(AddressedDataset(dataset), sampler=keys, num_workers=num_workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):  # the same three again do not count again
            labels = torch.cat([label for _, label in loader]).tolist()
            assert labels == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 0]
            images = torch.cat([image for image, _ in loader])
    clean, _ = build_dataset(True, make_args(tree, input_size=32))
    for index, replacement in ((0, 0), (1, 3), (2, 3), (10, 10), (11, 0)):
        torch.testing.assert_close(images[index], AddressedDataset(clean)[replacement, 7 * index][0], rtol=0, atol=0)


def test_every_skipped_image_is_named_once(tree: Path) -> None:
    for name in ("cat/1.png", "dog/0.png"):
        break_image(tree / "train" / name, "empty")
    dataset, _ = build_dataset(True, make_args(tree, skip_bad_images=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for index in range(12):
                dataset[index]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert str(tree / "train" / "cat" / "1.png") in messages[0]
    assert str(tree / "train" / "dog" / "0.png") in messages[1]


# torch waits up to five seconds for each worker of a loader that an error has ended.
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_one_bad_image_more_than_allowed_stops(tree: Path, num_workers: int) -> None:
    # One in each worker's share: the count is shared between them.
    for name in ("cat/0.png", "cat/1.png", "cat/2.png"):
        break_image(tree / "train" / name, "empty")
    dataset, _ = build_dataset(True, make_args(tree, input_size=32, skip_bad_images=2))
    loader = torch.utils.data.DataLoader(dataset, num_workers=num_workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"more than --skip-bad-images 2 bad images.*/train/cat/\d.png"):
            list(loader)


def test_negative_number_of_bad_images_is_refused(tree: Path) -> None:
    with pytest.raises(DataError, match="--skip-bad-images must not be negative, got -1"):
        build_dataset(True, make_args(tree, skip_bad_images=-1))


# ---------------------------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("data_set", ["IMNET", "IMNET100", "FOLDER"])
def test_classes_are_counted_from_the_tree(tree: Path, data_set: str) -> None:
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    args = make_args(tree, data_set=data_set)
    for is_train, size in ((True, 12), (False, 6)):
        dataset, num_classes = build_dataset(is_train, args, DEIT)
        assert (len(dataset), num_classes, count_classes(args)) == (size, 3, 3)
        image, label = dataset[size - 1]
        assert image.shape == (3, 224, 224) and label == 2
    assert NOMINAL_CLASSES.get(data_set) in (1000, 100, None)


def test_options_come_from_the_flags_that_a_command_has() -> None:
    words = ["--aa", "none", "--data-set", "IMNET", "--data-path", ""]
    main, other = get_args_parser().parse_args(words), Namespace(data_path="photos", seed=3)
    assert DataOptions.from_args(main) == DataOptions(aa="none")  # so the defaults are main.py's
    assert DataOptions.from_args(other) == DataOptions(data_path="photos")


def remove_class(root: Path, split: str, name: str) -> None:
    for path in (root / split / name).iterdir():
        path.unlink()
    (root / split / name).rmdir()


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize(("split", "other"), [("val", "train"), ("train", "val")])
def test_differing_classes_are_named(tree: Path, is_train: bool, split: str, other: str) -> None:
    remove_class(tree, split, "dog")
    with pytest.raises(DataError, match=f"only in {other}/: dog: add or remove"):
        build_dataset(is_train, make_args(tree))
    with pytest.raises(DataError, match="dog"):
        count_classes(make_args(tree))


def prepare_nothing(root: Path) -> str:
    return str(root / "nowhere")


def prepare_file(root: Path) -> str:
    (root / "images.7z").write_bytes(b"")
    return str(root / "images.7z")


def prepare_without_val(root: Path) -> str:
    (root / "val").rename(root / "validation")
    return str(root)


def prepare_empty_split(root: Path) -> str:
    for name in ("cat", "dog", "eel"):
        remove_class(root, "train", name)
    return str(root)


def prepare_empty_class(root: Path) -> str:
    for split in ("train", "val"):
        for path in (root / split / "dog").iterdir():
            path.unlink()
    return str(root)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: "", "--data-path is missing"),
        (prepare_nothing, "--data-path .*nowhere does not exist"),
        (prepare_file, "--data-path .*images.7z is a file"),
        (prepare_without_val, "--data-path .* has no folder val/"),
        (prepare_empty_split, "--data-path: .*train is empty"),
        (prepare_empty_class, "--data-path .*no valid file for the classes dog"),
    ],
)
def test_unusable_paths_are_explained(tree: Path, prepare: Callable[[Path], str], message: str) -> None:
    path = prepare(tree)
    for is_train in (True, False):
        with pytest.raises(DataError, match=message):
            build_dataset(is_train, make_args(path))


def test_unknown_data_set_is_refused(tree: Path) -> None:
    with pytest.raises(DataError, match="--data-set MNIST is unknown: choose one of IMNET, "):
        build_dataset(True, make_args(tree, data_set="MNIST"))


def test_evaluation_without_train_needs_the_nominal_classes(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / "val" / f"n{i:08d}").mkdir(parents=True)
        random_image(i, (4, 4)).save(tmp_path / "val" / f"n{i:08d}" / "0.png")
    args = make_args(tmp_path, data_set="IMNET100")
    assert build_dataset(False, args)[1] == count_classes(args, is_train=False) == 100
    with pytest.raises(DataError, match="no folder train/"):
        build_dataset(True, args)
    with pytest.raises(DataError, match="no folder train/"):  # could be shifted: nobody knows the number of classes
        build_dataset(False, make_args(tmp_path))


@pytest.mark.parametrize("with_train", [True, False])
def test_numbered_folders_keep_the_labels_that_training_gave_them(
    with_train: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sorted as text, as ever: a checkpoint keeps its meaning. Without train/ they may be labels, which is said."""
    for split in ("train", "val")[not with_train :]:
        for label in range(100):
            (tmp_path / split / str(label)).mkdir(parents=True)
            random_image(label, (4, 4)).save(tmp_path / split / str(label) / "0.png")
    dataset, _ = build_dataset(False, make_args(tmp_path, data_set="IMNET100"))
    assert dataset.class_to_idx["10"] == 2 and dataset.classes == sorted(map(str, range(100)))
    assert ("give --data-set IMNET-V2" in caplog.text) == (not with_train)


# ---------------------------------------------------------------------------------------------------- other data sets


def write_fashion_mnist(folder: Path, compress: bool) -> None:
    folder.mkdir(parents=True)
    for prefix, number in (("train", 20), ("t10k", 10)):
        pixels = np.random.default_rng(number).integers(0, 256, (number, 28, 28), dtype=np.uint8)
        labels = np.arange(number, dtype=np.uint8) % 10
        for name, content in (
            ("images-idx3", struct.pack(">4I", 0x803, number, 28, 28) + pixels.tobytes()),
            ("labels-idx1", struct.pack(">2I", 0x801, number) + labels.tobytes()),
        ):
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize(("layout", "compress"), [("", True), ("", False), ("FashionMNIST/raw", False)])
def test_fashion_mnist_is_read_from_torchvisions_or_debians_layout(tmp_path: Path, layout: str, compress: bool) -> None:
    root = tmp_path / "data"
    write_fashion_mnist(root / layout, compress)
    args = make_args(root, data_set="FMNIST", input_size=28)
    for is_train, size in ((True, 20), (False, 10)):
        dataset, num_classes = build_dataset(is_train, args, DEIT)
        assert (len(dataset), num_classes, count_classes(args)) == (size, 10, 10)
        image, label = dataset[3]
        assert image.shape == (3, 28, 28) and label == 3
    pixels = np.random.default_rng(10).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    image = image * torch.tensor(DEIT["std"])[:, None, None] + torch.tensor(DEIT["mean"])[:, None, None]
    np.testing.assert_allclose(image[1] * 255, pixels[3], atol=1e-3)


def test_damaged_fashion_mnist_is_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data", compress=False)
    path = tmp_path / "data" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{path} is cut short"):
        build_dataset(False, make_args(tmp_path / "data", data_set="FMNIST"))


def test_debians_fashion_mnist_is_read() -> None:
    root = Path("/usr/share/datasets/fashion-mnist")
    if not root.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    for is_train, size in ((True, 60_000), (False, 10_000)):
        dataset, num_classes = build_dataset(is_train, make_args(root, data_set="FMNIST", input_size=32))
        assert (len(dataset), num_classes) == (size, 10)
        assert dataset[0][1] == 9  # an ankle boot


@pytest.mark.parametrize(
    ("data_set", "hint"),
    [("CIFAR", "cifar-100-python"), ("CIFAR10", "cifar-10-batches-py"), ("FMNIST", "train-images-idx3-ubyte.gz")],
)
def test_absent_files_are_explained(tmp_path: Path, data_set: str, hint: str) -> None:
    with pytest.raises(DataError, match=f"--data-set {data_set} .*{hint}.*--download"):
        build_dataset(True, make_args(tmp_path, data_set=data_set))


INAT_CATEGORIES = [
    {"id": 0, "kingdom": "Animalia", "name": "vulpes"},
    {"id": 1, "kingdom": "Plantae", "name": "quercus"},
    {"id": 2, "kingdom": "Animalia", "name": "lynx"},
]


def write_inat(root: Path, year: int, super_folder: bool) -> None:
    (root / "categories.json").write_text(json.dumps(INAT_CATEGORIES))
    identifier = 100
    for split, categories in (("train", [2, 0, 1, 2]), ("val", [1, 2])):
        images, annotations = [], []
        for category in categories:
            parts = [f"train_val{year}", "Mammals", str(category), f"{identifier}.jpg"]
            images.append({"id": identifier, "file_name": "/".join(parts)})
            annotations.append({"image_id": identifier, "category_id": category})
            path = root.joinpath(*(parts if super_folder else parts[:1] + parts[2:]))
            path.parent.mkdir(parents=True, exist_ok=True)
            random_image(identifier).save(path)
            identifier += 1
        # The two lists need not be in the same order.
        content = {"images": images, "annotations": annotations if split == "train" else annotations[::-1]}
        (root / f"{split}{year}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("super_folder", [True, False])
@pytest.mark.parametrize(("data_set", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_labels_follow_the_chosen_level(
    tmp_path: Path, data_set: str, year: int, super_folder: bool
) -> None:
    write_inat(tmp_path, year, super_folder)
    for category, names, train_labels, val_labels in (
        ("name", ["lynx", "vulpes", "quercus"], [0, 1, 2, 0], [2, 0]),
        ("kingdom", ["Animalia", "Plantae"], [0, 0, 1, 0], [1, 0]),
    ):
        args = make_args(tmp_path, data_set=data_set, inat_category=category, input_size=32)
        for is_train, labels in ((True, train_labels), (False, val_labels)):
            dataset, num_classes = build_dataset(is_train, args)
            assert dataset.classes == names
            assert num_classes == count_classes(args) == len(names)
            assert [dataset[i][1] for i in range(len(dataset))] == dataset.targets == labels
            assert "INaturalist" in repr(dataset)


def test_inaturalist_errors_name_what_is_missing(tmp_path: Path) -> None:
    write_inat(tmp_path, 2018, True)
    with pytest.raises(DataError, match="--inat-category genus: .*categories.json has no such level"):
        build_dataset(True, make_args(tmp_path, data_set="INAT", inat_category="genus"))
    with pytest.raises(DataError, match="train2019.json is missing"):
        build_dataset(True, make_args(tmp_path, data_set="INAT19"))
    (tmp_path / "val2018.json").write_text("{")
    with pytest.raises(DataError, match="val2018.json is not readable as json"):
        build_dataset(False, make_args(tmp_path, data_set="INAT"))


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Two classes of 20 images each."""
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(20):
                random_image(100 * label + i, (16, 16)).save(tmp_path / split / name / f"{i:02d}.png")
    return tmp_path


def load_epochs(
    root: Path, num_workers: int, epochs: list[tuple[int, int]], repeated_aug: bool = True, rank: int = 0
) -> list[torch.Tensor]:
    """Images of the given (epoch, start) pairs, from one loader."""
    dataset, _ = build_dataset(True, make_args(root, input_size=48))
    sampler, _ = build_samplers(dataset, dataset, world_size=2, rank=rank, repeated_aug=repeated_aug, seed=3)
    loader = build_loader(dataset, sampler, batch_size=4, num_workers=num_workers, pin_memory=False, drop_last=True)
    result = []
    for epoch, start in epochs:
        sampler.set_epoch(epoch, start=start)
        result.append(torch.cat([images for images, _ in loader]))
    return result


@pytest.mark.parametrize("repeated_aug", [True, False])
def test_samples_are_the_same_whatever_the_workers(many: Path, repeated_aug: bool) -> None:
    random.seed(1)
    reference = load_epochs(many, 0, [(0, 0), (1, 0)], repeated_aug)
    assert len(reference[0]) == 20
    assert not torch.equal(reference[0], reference[1])
    for num_workers in (1, 3):
        random.seed(num_workers)
        np.random.seed(num_workers)
        torch.manual_seed(num_workers)
        for expected, images in zip(
            reference, load_epochs(many, num_workers, [(0, 0), (1, 0)], repeated_aug), strict=True
        ):
            assert torch.equal(expected, images)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_resumed_epoch_loads_the_tail_of_the_whole_one(many: Path, num_workers: int) -> None:
    (whole,) = load_epochs(many, 0, [(2, 0)])
    _, tail, following = load_epochs(many, num_workers, [(0, 0), (2, 8), (3, 0)])
    assert torch.equal(tail, whole[8:])
    assert len(following) == len(whole)


def test_ranks_draw_differently(many: Path) -> None:
    dataset, _ = build_dataset(True, make_args(many, input_size=48))
    samplers = [
        build_samplers(dataset, dataset, world_size=2, rank=rank, repeated_aug=True, seed=0)[0] for rank in (0, 1)
    ]
    seeds = [{seed for _, seed in sampler} for sampler in samplers]
    assert not seeds[0] & seeds[1]


def test_loading_in_the_main_process_leaves_its_generators_alone(tree: Path) -> None:
    dataset = AddressedDataset(build_dataset(True, make_args(tree, input_size=32))[0])
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, again, other = dataset[0, 1][0], dataset[0, 1][0], dataset[0, 2][0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[2], torch.get_rng_state())
    assert dataset[0][1] == 0  # a plain index draws from the process's own generators


def test_datasets_can_be_sent_to_spawned_workers(tree: Path) -> None:
    dataset, _ = build_dataset(True, make_args(tree, input_size=32))
    assert len(pickle.loads(pickle.dumps(AddressedDataset(dataset)))) == 12


def test_batch_larger_than_the_epoch_is_explained(tree: Path) -> None:
    dataset, _ = build_dataset(True, make_args(tree))
    sampler, val_sampler = build_samplers(dataset, dataset, world_size=2, rank=0, repeated_aug=False, seed=0)
    settings = {"num_workers": 0, "pin_memory": False}
    with pytest.raises(DataError, match="--batch-size 8 is larger than the 6 training samples .*--batch-size 6"):
        build_loader(dataset, sampler, batch_size=8, drop_last=True, **settings)
    loader = build_loader(dataset, val_sampler, batch_size=8, drop_last=False, **settings)
    assert loader.sampler.num_valid_samples == 6
    assert sum(len(labels) for _, labels in loader) == 6


class KillsWorker(torch.utils.data.Dataset):
    """A data set whose worker is killed, as the kernel does when memory runs out."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), self.signal_number)
        return index

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("signal_number", "advice"), [(signal.SIGKILL, "a worker process was killed"), (signal.SIGBUS, "--shm-size")]
)
def test_dead_worker_is_explained(signal_number: int, advice: str) -> None:
    loader = build_loader(
        KillsWorker(signal_number), range(4), batch_size=1, num_workers=1, pin_memory=False, drop_last=False
    )
    with pytest.raises(DataError, match=f"{advice}.*--num_workers"), explain_loader_errors():
        list(loader)


@pytest.mark.parametrize(
    "error",
    [EOFError(), FileNotFoundError(2, "gone"), ConnectionResetError(), RuntimeError("Pin memory thread exited")],
    ids=repr,
)
def test_a_worker_that_dies_during_a_hand_over_is_explained(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the main process then meets is a closed pipe, or a socket that is not there any more."""
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    monkeypatch.setattr(readers.loader, "_workers", {"a loader": [worker]})
    with pytest.raises(type(error)), explain_loader_errors():
        raise error  # of something else, while all is well
    worker.kill()
    with pytest.raises(DataError, match="a worker process was killed.*--num_workers"), explain_loader_errors():
        raise error


def test_a_worker_s_death_may_be_reported_while_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's handler of SIGCHLD raises wherever the main process just is."""

    def died() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(readers.loader, "_died", died)
    with pytest.raises(DataError, match="a worker process was killed.*pid 7"), explain_loader_errors():
        raise ConnectionResetError


def test_workers_are_started_without_work_and_draw_what_later_ones_would() -> None:
    def batches(start: bool) -> list[list[int]]:
        loader = build_loader(
            list(range(10)), range(10), batch_size=3, num_workers=2, pin_memory=False, drop_last=False
        )
        if start:
            start_workers(loader)
            assert all(worker.is_alive() for worker in loader._iterator._workers)
        return [batch.tolist() for _ in range(2) for batch in loader]

    assert batches(start=True) == batches(start=False) == 2 * [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_a_limit_of_open_files_that_is_too_low_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``ulimit -n 40``; a lower soft limit is raised."""
    loader = build_loader(list(range(4)), range(4), batch_size=1, num_workers=8, pin_memory=False, drop_last=False)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (40, 40))
    with pytest.raises(DataError, match="--num_workers 8: about .* open files are needed, the limit is 40"):
        start_workers(loader)
    with pytest.raises(DataError, match="too many files are open"), explain_loader_errors():
        raise OSError(errno.EMFILE, "Too many open files")


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="^mat1 and mat2"), explain_loader_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_workers_leave_interrupts_to_the_main_process() -> None:
    loader = build_loader(
        KillsWorker(signal.SIGINT), range(4), batch_size=2, num_workers=1, pin_memory=False, drop_last=False
    )
    assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3]
