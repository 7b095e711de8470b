"""The fast loader gives the plain loader's pictures, from draws that neither workers nor restarts change."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

import build
import datasets
import fastload
from options import get_args_parser
from readers.images import BadImageError, load_image, open_image
from readers.loader import build_loader, seeded
from samplers import build_samplers, sample_seed
from scripts.benchmark_data import make_photographs
from utils import World, seed_everything

CPU = torch.device("cpu")
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

# A machine with fewer cores than a test has workers is no problem here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 40 JPEG photographs of 500x375 pixels."""
    folder = tmp_path_factory.mktemp("photographs")
    make_photographs(folder, 40)
    return folder


def make_args(path: Path | str = "", *flags: str) -> datasets.DataOptions:
    args = get_args_parser().parse_args(["--data-set", "FOLDER", "--data-path", str(path), *flags])
    return datasets.DataOptions.from_args(args)


def plain_image(path: Path | str, seed: int, args: datasets.DataOptions) -> Tensor:
    with seeded(seed):
        return datasets.build_transform(True, args)(load_image(str(path)))


def fast_image(path: Path | str, seed: int, args: datasets.DataOptions) -> Tensor:
    """The same through bytes and the device's part."""
    with seeded(seed):
        pixels = fastload.build_transform(args)(open_image(str(path)))
    assert pixels.dtype == torch.uint8 and pixels.shape == (args.input_size, args.input_size, 3)
    return fastload.build_device_transform(args)(pixels[None])[0]


def levels_apart(a: Tensor, b: Tensor) -> Tensor:
    """Difference of normalised images in levels of 255."""
    return ((a - b) * STD).abs() * 255


# ------------------------------------------------------------------------------------------------------- same pictures


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random", "lanczos"])
def test_the_crop_and_the_flip_are_the_plain_ones_to_a_rounding_of_few_pixels(
    photographs: Path, interpolation: str
) -> None:
    args = make_args("", "--aa", "none", "--color-jitter", "0", "--reprob", "0", "--train-interpolation", interpolation)
    apart = torch.stack(
        [
            levels_apart(plain_image(path, seed, args), fast_image(path, seed, args))
            for seed, path in enumerate(sorted(photographs.glob("train/*/*.jpg"))[:20])
        ]
    )
    assert apart.max() < 2.01
    assert (apart > 0.01).float().mean() < 0.01


@pytest.mark.parametrize("flags", [(), ("--src",), ("--three-augment", "--color-jitter", "0.3")], ids=str)
def test_the_whole_recipe_differs_from_the_plain_one_by_roundings_only(
    photographs: Path, flags: tuple[str, ...]
) -> None:
    """Equal draws give equal pictures: the median over images, for equalize turns a level of input into several."""
    args = make_args("", "--reprob", "0", *flags)
    apart = torch.stack(
        [
            levels_apart(plain_image(path, seed, args), fast_image(path, seed, args))
            for seed, path in enumerate(sorted(photographs.glob("train/*/*.jpg")))
        ]
    )
    assert apart.flatten(1).mean(1).median() < 0.02
    assert apart.mean() < 0.3


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_images_of_one_or_two_pixels_are_the_plain_ones(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (200, 30, 90)).save(path := str(tmp_path / "tiny.png"))
    args = make_args("", "--aa", "none", "--reprob", "0")
    for seed in range(40):  # some crops have no pixel at all
        assert levels_apart(plain_image(path, seed, args), fast_image(path, seed, args)).max() < 1.01


@pytest.mark.parametrize("flags", [["--input-size", "32"], ["--input-size", "32", "--aa", "none"]])
def test_small_images_are_padded_and_cropped_as_plainly(photographs: Path, flags: list[str]) -> None:
    args = make_args("", "--reprob", "0", *flags)
    for seed, path in enumerate(sorted(photographs.glob("train/*/*.jpg"))[:5]):
        assert torch.equal(plain_image(path, seed, args), fast_image(path, seed, args))


@pytest.mark.parametrize("flags", [("--three-augment", "--color-jitter", "0.3"), ("--aa", "none")], ids=str)
def test_the_simple_crop_is_the_plain_one_to_the_bit(photographs: Path, flags: tuple[str, ...]) -> None:
    args = make_args("", "--input-size", "96", "--reprob", "0", "--src", *flags)
    for seed, path in enumerate(sorted(photographs.glob("train/*/*.jpg"))[:5]):
        assert torch.equal(plain_image(path, seed, args), fast_image(path, seed, args))


def test_normalisation_on_the_device_is_that_of_the_plain_transform_to_the_bit() -> None:
    args = make_args("", "--reprob", "0")
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    *_, to_tensor, normalize = datasets.build_transform(True, args).transforms
    expected = normalize(to_tensor(Image.fromarray(pixels.numpy())))
    assert torch.equal(fastload.build_device_transform(args)(pixels[None])[0], expected)


def test_large_files_are_decoded_smaller_and_look_the_same(tmp_path: Path) -> None:
    args = make_args("", "--input-size", "56", "--aa", "none", "--color-jitter", "0", "--reprob", "0")
    make_photographs(tmp_path, 4)
    crop = fastload.build_transform(args).transforms[0]
    reduced = 0
    for seed in range(40):
        path = tmp_path / "train" / "photographs" / f"{seed % 4:05}.jpg"
        with seeded(seed):
            image = open_image(str(path))
            crop(image)
            reduced += image.width < 500
        plain, fast = plain_image(path, seed, args), fast_image(path, seed, args)
        assert levels_apart(plain, fast).mean() < 2
        assert fast.diff(dim=1).std().item() == pytest.approx(plain.diff(dim=1).std().item(), rel=0.1)
    assert 10 < reduced < 40


def test_a_crop_is_reduced_only_where_enough_pixels_remain(tmp_path: Path) -> None:
    Image.new("RGB", (1001, 900)).save(tmp_path / "a.jpg")
    for reduction, expected in ((1.99, 1001), (2.0, 1001), (2.01, 501), (3.9, 501), (4.1, 251), (100, 126)):
        image = open_image(str(tmp_path / "a.jpg"))
        scale = fastload._reduce(image, reduction)
        assert image.width == expected and scale >= 1 / reduction
    Image.new("RGB", (1001, 900)).save(tmp_path / "a.png")
    assert fastload._reduce(open_image(str(tmp_path / "a.png")), 4) == 1


@pytest.mark.slow
def test_two_thousand_images_have_the_distribution_of_the_plain_ones(photographs: Path) -> None:
    """Two samples of other draws: brightness, contrast and sharpness of each channel of an image, erasing included."""
    args = make_args(photographs)
    paths = sorted(photographs.glob("train/*/*.jpg"))
    fast_transform, plain_transform = fastload.build_transform(args), datasets.build_transform(True, args)
    finish = fastload.build_device_transform(args)

    def statistics(image: Tensor) -> Tensor:
        channels = image.flatten(1)
        return torch.cat([channels.mean(1), channels.std(1), image.diff(dim=1).abs().mean((1, 2))])

    plain, fast = [], []
    for i in range(2000):
        with seeded(sample_seed(0, 0, 0, i)):
            plain.append(statistics(plain_transform(load_image(str(paths[i % 40])))))
        with seeded(sample_seed(0, 1, 0, i)):
            pixels = fast_transform(open_image(str(paths[i % 40])))
            fast.append(statistics(finish(pixels[None])[0]))
    plain, fast = torch.stack(plain).numpy(), torch.stack(fast).numpy()
    p_values = [ks_2samp(plain[:, i], fast[:, i]).pvalue for i in range(plain.shape[1])]
    assert min(p_values) > 0.01, p_values
    # Moments over all pixels of a channel: equal within four standard errors.
    errors = np.sqrt((plain.var(0) + fast.var(0)) / len(plain))
    assert (np.abs(plain.mean(0) - fast.mean(0)) < 4 * errors).all()


def test_crops_have_the_areas_shapes_and_places_of_the_plain_ones(tmp_path: Path) -> None:
    """Read off pictures whose red grows to the right and whose green grows downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 200))
    path = tmp_path / "ramp.png"
    Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8)).save(path)
    args = make_args("", "--input-size", "40", "--aa", "none", "--color-jitter", "0", "--reprob", "0")

    def geometry(image: Tensor) -> Tensor:
        left_right, top_bottom = (image * STD * 255)[:2]
        width = (left_right[:, -1] - left_right[:, 0]).mean()
        height = (top_bottom[-1] - top_bottom[0]).mean()
        return torch.stack([width.abs(), height, left_right.mean(), top_bottom.mean(), width.sign()])

    plain = torch.stack([geometry(plain_image(path, seed, args)) for seed in range(300)])
    fast = torch.stack([geometry(fast_image(path, seed, args)) for seed in range(300)])
    assert (plain - fast).abs().max() < 0.5  # one by one, with the same seeds
    others = torch.stack([geometry(fast_image(path, seed, args)) for seed in range(300, 600)])
    p_values = [ks_2samp(plain[:, i].numpy(), others[:, i].numpy(), method="asymp").pvalue for i in range(5)]
    assert min(p_values) > 0.01, p_values


# ------------------------------------------------------------------------------------------------------------- erasing


def erased_batches(mode: str, probability: float, batches: int = 60) -> tuple[Tensor, Tensor]:
    """Grey batches after the device's part, and where they were erased."""
    args = make_args("", "--reprob", str(probability), "--remode", mode)
    finish = fastload.build_device_transform(args)
    random.seed(0)
    torch.manual_seed(0)
    grey = torch.full((16, 64, 64, 3), 200, dtype=torch.uint8)
    images = torch.cat([finish(grey) for _ in range(batches)])
    untouched = fastload.build_device_transform(make_args("", "--reprob", "0"))(grey[:1])
    return images, (images != untouched).any(1)


def test_erasing_writes_normal_noise_over_rectangles_of_the_published_law() -> None:
    images, erased = erased_batches("pixel", 0.25)
    shares = erased.float().mean((1, 2))
    hit = shares > 0
    assert 0.20 < hit.float().mean() < 0.30
    assert 0.015 < shares[hit].min() and shares[hit].max() < 0.35
    for mask in erased[hit]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns
    noise = images.permute(0, 2, 3, 1)[erased]
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    assert noise.T.corrcoef().fill_diagonal_(0).abs().max() < 0.02

    plain = RandomErasing(0.25, mode="pixel", max_count=1, device="cpu")
    references = [plain(torch.full((3, 64, 64), 7.0)) for _ in range(960)]
    areas = torch.stack([(image != 7).any(0).float().mean() for image in references])
    assert ks_2samp(areas[areas > 0].numpy(), shares[hit].numpy()).pvalue > 0.01


def test_erasing_is_off_at_probability_zero_and_grey_with_mode_const() -> None:
    assert not erased_batches("pixel", 0, batches=2)[1].any()
    images, erased = erased_batches("const", 1, batches=2)
    assert erased.any((1, 2)).all()
    assert (images.permute(0, 2, 3, 1)[erased] == 0).all()


# ----------------------------------------------------------------------------------------------------------- exactness


def load_epoch(folder: Path, workers: int, *flags: str, done: int = 0, epoch: int = 1) -> list[tuple[Tensor, Tensor]]:
    """All batches as the model gets them, from batch ``done`` on."""
    args = make_args(folder, "--input-size", "96", *flags)
    dataset = fastload.build_dataset(args)[0]
    sampler = build_samplers(dataset, dataset, world_size=2, rank=1, repeated_aug=True, seed=3)[0]
    sampler.set_epoch(epoch, start=4 * done)
    loading = dict(batch_size=4, num_workers=workers, pin_memory=False, drop_last=True, image_bytes=3 * 96**2)
    loader = build_loader(dataset, sampler, **loading)
    finish = fastload.build_device_transform(args)
    batches = []
    for step, (pixels, labels) in enumerate(loader, start=done):
        assert pixels.dtype == torch.uint8  # no floats between processes
        seed_everything(3, 1, epoch, step)
        batches.append((finish(pixels), labels))
    return batches


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("flags", [(), ("--three-augment", "--src")], ids=str)
def test_neither_workers_nor_a_restart_change_a_batch(photographs: Path, flags: tuple[str, ...]) -> None:
    whole = load_epoch(photographs, 0, *flags)
    assert len(whole) == 5
    assert same(whole, load_epoch(photographs, 1, *flags))
    assert same(whole, load_epoch(photographs, 3, *flags))
    assert same(whole[2:], load_epoch(photographs, 2, *flags, done=2))
    assert not same(whole, load_epoch(photographs, 0, *flags, epoch=2))


@pytest.mark.parametrize(
    "processes, files, local", [(1, 1 / 3, False), (2, 2 / 3, False), (3, 1, False), (3, 1 / 3, True)]
)
@pytest.mark.parametrize("flags", [(), ("--three-augment", "--src")], ids=str)
def test_repeated_augmentation_reads_a_file_once_and_changes_no_image(
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    processes: int,
    files: float,
    local: bool,
) -> None:
    args = make_args(photographs, "--input-size", "96", "--reprob", "0", *flags)
    dataset, transform = fastload.build_dataset(args)[0], fastload.build_transform(args)
    opened = []
    monkeypatch.setattr(fastload, "open_image", lambda path: opened.append(path) or open_image(path))
    sampler = build_samplers(
        dataset, dataset, world_size=processes, rank=0, repeated_aug=True, repeats_on_one_rank=local, seed=3
    )[0]
    keys = list(sampler)[:12]
    for index, seed in keys:
        with seeded(seed):
            image, _ = dataset[index]
        with seeded(seed):
            assert torch.equal(image, transform(open_image(dataset.samples[index][0])))
    assert len(opened) == files * len(keys)


def test_a_file_that_crops_decode_at_a_reduced_scale_is_read_each_time(tmp_path: Path) -> None:
    make_photographs(tmp_path, 1, size=(1600, 1200))
    args = make_args(tmp_path, "--reprob", "0", "--aa", "none")
    dataset, transform = fastload.build_dataset(args)[0], fastload.build_transform(args)
    for seed in range(8):  # some are reduced, some are not
        with seeded(seed):
            image, _ = dataset[0]
        with seeded(seed):
            assert torch.equal(image, transform(open_image(dataset.samples[0][0])))


def test_workers_do_not_need_their_random_state_back_but_the_main_process_does(photographs: Path) -> None:
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    expected = random.random(), torch.rand(()).item(), np.random.rand()
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    with seeded(5):
        fastload.build_transform(make_args())(open_image(str(next(photographs.glob("train/*/*.jpg")))))
    assert (random.random(), torch.rand(()).item(), np.random.rand()) == expected


# ------------------------------------------------------------------------------------------------------------ any file


@pytest.mark.parametrize(
    "mode, suffix", [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("I;16", "png"), ("LA", "png")]
)
def test_every_kind_of_image_becomes_bytes_of_three_channels(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.arange(90 * 70, dtype=np.uint16).reshape(90, 70) * 10).save(path)
    else:
        pixels = np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    args = make_args("", "--input-size", "48", "--aa", "none", "--color-jitter", "0", "--reprob", "0")
    for seed in range(3):
        assert levels_apart(plain_image(path, seed, args), fast_image(path, seed, args)).max() < 2.01


@pytest.mark.parametrize("length", [10, 3000])
def test_a_damaged_file_is_named_wherever_the_damage_is(photographs: Path, tmp_path: Path, length: int) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(next(photographs.glob("train/*/*.jpg")).read_bytes()[:length])
    with pytest.raises(BadImageError, match="broken.jpg .*--skip-bad-images"):
        fastload.build_transform(make_args())(open_image(str(broken)))


def test_damaged_files_are_skipped_up_to_the_limit(photographs: Path, tmp_path: Path) -> None:
    make_photographs(tmp_path, 3)
    broken = tmp_path / "train" / "photographs" / "00001.jpg"
    broken.write_bytes(broken.read_bytes()[:3000])
    dataset = fastload.build_dataset(make_args(tmp_path, "--skip-bad-images", "1"))[0]
    with pytest.warns(UserWarning, match="skipped bad image 1 of at most 1"):
        pixels, _ = dataset[1]
    assert pixels.dtype == torch.uint8
    assert dataset[1][0].shape == pixels.shape  # again, as repeated augmentation does


# -------------------------------------------------------------------------------------------------------------- opt-out


class Headless(nn.Module):
    """As much of a model as the loaders look at."""

    pretrained_cfg = {"input_size": (3, 224, 224), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.25)}


@pytest.mark.parametrize("plain", [False, True])
def test_the_flag_chooses_between_bytes_and_floats(photographs: Path, plain: bool) -> None:
    flags = ["--num_workers", "0", "--batch-size", "4", *(["--no-fast-loader"] if plain else [])]
    args = get_args_parser().parse_args(["--data-set", "FOLDER", "--data-path", str(photographs), *flags])
    loaders = build.build_loaders(args, Headless(), World(0, 0, 1, CPU))
    images, _ = next(iter(loaders.train))
    assert images.dtype == (torch.float32 if plain else torch.uint8)
    assert next(iter(loaders.val))[0].dtype == images.dtype
    assert (loaders.prepare is None) == (loaders.prepare_eval is None) == plain
    if not plain:
        finish = loaders.prepare
        assert finish(images).shape == (4, 3, 224, 224)
        assert finish.std.flatten().tolist() == [0.25, 0.5, 0.25]
