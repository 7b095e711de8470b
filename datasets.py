"""Images: which files make up a data set, how they become tensors, and how they are loaded.

A file is a path, or a ``Member`` of an archive or a shard that is read in place (``archives.py``, ``shards.py``).

``DataOptions`` says which images and how they are augmented, with DeiT's names and defaults. Any fault in the data
raises a ``DataError``: one sentence that names the flag, the path and the way out.
"""

import hashlib
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, DatasetFolder, FashionMNIST, VisionDataset

from readers import archives, shards
from readers.archives import DataError
from readers.image_sets import (
    FlatFashionMNIST,
    ImageTree,
    INaturalistJson,
    MemberImages,
    NumberedTree,
    SkipBadImages,
    class_folders,
    fashion_mnist_file,
    is_numbered,
    numbered_folders,
    shorten,
)
from readers.images import File, load_image, to_rgb
from readers.real_labels import WithRealLabels

_logger = logging.getLogger(__name__)

# Number of classes each data set is known for; the trees on disk are counted and may hold another number.
NOMINAL_CLASSES = {
    "IMNET": 1000,
    "IMNET100": 100,
    "IMNET-V2": 1000,
    "CIFAR": 100,
    "CIFAR10": 10,
    "FMNIST": 10,
    "INAT": 8142,
    "INAT19": 1010,
}
DATA_SETS = (*NOMINAL_CLASSES, "FOLDER", "wds")
INAT_YEARS = {"INAT": 2018, "INAT19": 2019}
AUTO_AUGMENT_FAMILIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are transformed. Names and defaults are those of main.py's flags."""

    data_set: str = "IMNET"  # one of DATA_SETS
    data_path: str = ""
    inat_category: str = "name"
    num_classes: int | None = None  # for shards that do not name their classes
    download: bool = False
    skip_bad_images: int = 0
    shard_cache: str = ""
    shard_cache_gb: float = 64.0
    input_size: int = 224
    # Training: DeiT's recipe.
    color_jitter: float = 0.4  # only where aa is off, and with three_augment
    hflip: float = 0.5
    aa: str | None = "rand-m9-mstd0.5-inc1"  # "none" or "" switches it off
    three_augment: bool = False  # in place of aa; color_jitter follows it
    src: bool = False  # simple random crop, in place of the random resized crop
    train_interpolation: str = "bicubic"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    # Evaluation.
    eval_crop_ratio: float | None = None  # None: the model's own crop_pct
    val_split: float = 0.0  # share of the training images of each class that is held out; 0: none
    val_split_seed: int = 0
    real_labels: str = ""  # ReaL's real.json: targets of evaluation images have these labels too

    @classmethod
    def from_args(cls, args: Namespace) -> "DataOptions":
        """Options from a command's parsed arguments; those it has no flag for keep their defaults."""
        given = vars(args)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


# ----------------------------------------------------------------------------------------------------------- transforms


def build_transform(
    is_train: bool, options: DataOptions, data_config: dict[str, Any] | None = None, *, as_image: bool = False
) -> transforms.Compose:
    """Transform from an RGB image of any size to a normalised float tensor of shape (3, input_size, input_size).

    Args:
        is_train: Whether to augment with DeiT's recipe. Otherwise the shorter side is resized to
            ``floor(input_size / crop_pct)`` and the centre is cropped.
        options: With an ``input_size`` of up to 32, training and evaluation resize to it, and training then crops with
            a padding of 4 instead of a random resized crop. With ``src`` training does so at any size, with reflected
            padding.
        data_config: ``timm.data.resolve_data_config({}, model=model)``: ``mean``, ``std``, ``crop_pct`` and
            ``interpolation`` (of the evaluation). None: timm's defaults, those of ImageNet.
        as_image: Whether the transform stops before the tensor and returns the augmented or cropped image.

    Raises:
        DataError: If ``aa`` or ``eval_crop_ratio`` has no meaning.

    Source: DeiT's recipe, arXiv 2012.12877, table 9; ``three_augment`` and ``src``: DeiT III, arXiv 2204.07118.
    """
    config = data_config or resolve_data_config(
        pretrained_cfg={"input_size": (3, options.input_size, options.input_size)}
    )
    small = options.input_size <= 32
    if is_train:
        crop, augment, finish = create_transform(
            input_size=options.input_size,
            is_training=True,
            separate=True,
            color_jitter=options.color_jitter,
            hflip=options.hflip,
            # timm's name of ThreeAugment: grey, solarised from 128, or blurred (radius 0.1 to 2), equally likely.
            auto_augment="3a" if options.three_augment else _auto_augment_policy(options.aa),
            interpolation=options.train_interpolation,
            mean=config["mean"],
            std=config["std"],
            re_prob=options.reprob,
            re_mode=options.remode,
            re_count=options.recount,
        )
        if options.src:
            crop.transforms[:1] = [
                transforms.Resize(options.input_size, interpolation=str_to_interp_mode(options.train_interpolation)),
                transforms.RandomCrop(options.input_size, padding=4, padding_mode="reflect"),
            ]
        elif small:
            # An image of 32 pixels has no room for a random crop of 8% of its area.
            bicubic = str_to_interp_mode("bicubic")
            crop.transforms[:1] = [
                transforms.Resize(options.input_size, interpolation=bicubic),
                transforms.RandomCrop(options.input_size, padding=4),
            ]
        parts = (crop, augment) if as_image else (crop, augment, finish)
        return transforms.Compose([step for part in parts for step in part.transforms])
    crop_ratio = options.eval_crop_ratio
    if crop_ratio is None:
        crop_ratio = config["crop_pct"]
    if not 0 < crop_ratio <= 1:
        raise DataError(f"--eval-crop-ratio must lie in (0, 1], got {crop_ratio}; 0.875 resizes to 256 for 224 pixels")
    transform = create_transform(
        input_size=options.input_size,
        is_training=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=1.0 if small else crop_ratio,
    )
    if as_image:
        del transform.transforms[-2:]  # to a tensor, normalised
    return transform


def _auto_augment_policy(aa: str | None) -> str | None:
    """timm's policy string of ``--aa``, or None where it is switched off."""
    if aa is None or aa.strip().lower() in ("", "none"):
        return None
    if aa.split("-")[0] not in AUTO_AUGMENT_FAMILIES:
        raise DataError(
            f"--aa {aa!r} is no augmentation policy: use for example 'rand-m9-mstd0.5-inc1', 'original', or 'none'"
        )
    for section in aa.split("-")[1:]:  # timm ignores one without a number
        if not section.startswith("t") and not any(map(str.isdigit, section)):
            raise DataError(f"--aa {aa!r}: {section!r} has no number: use for example 'rand-m9-mstd0.5-inc1'")
    return aa


# ------------------------------------------------------------------------------------------------------------ data sets


def build_dataset(
    is_train: bool,
    options: DataOptions,
    data_config: dict[str, Any] | None = None,
    *,
    transform: Callable | None = None,
    loader: Callable[[File], Image.Image] = load_image,
) -> tuple[Dataset, int]:
    """Data set of the training or the evaluation images, and the number of classes.

    With ``val_split``, the training set leaves out the images of :func:`build_held_out`. ``skip_bad_images`` is for
    training: evaluation counts each image exactly once, and stops at one that it cannot read.

    Args:
        is_train: Whether to build the training set with its augmentation.
        options: Which images, and how they are transformed.
        data_config: As in ``build_transform``.
        transform: In place of ``build_transform``'s.
        loader: Reads a file: ``load_image``, or ``open_image`` for a transform that decodes.

    Returns:
        The data set, whose items are (tensor of shape (3, input_size, input_size), label), and its number of classes,
        counted, not assumed; compare with ``NOMINAL_CLASSES``. With ``real_labels``, an evaluation image has
        ``WithRealLabels``'s targets in place of its label.

    Raises:
        DataError: If the data are not there or not usable.
    """
    transform = transform or build_transform(is_train, options, data_config)
    dataset = _build_split(is_train, options, transform, loader)
    if is_train and options.val_split:
        dataset = Part(dataset, _split(dataset, options)[0])
    if not is_train and options.real_labels:
        dataset = WithRealLabels(dataset, options.real_labels)
    if is_train:
        dataset = _skip_bad_images(dataset, options)
    return dataset, len(dataset.classes)


def build_held_out(
    options: DataOptions, data_config: dict[str, Any] | None = None, *, transform: Callable | None = None
) -> Dataset:
    """The training images that ``val_split`` holds out, transformed like evaluation images.

    Args:
        options: With a ``val_split`` above 0.
        data_config: As in ``build_transform``.
        transform: As in ``build_dataset``.

    Raises:
        DataError: If the data are not there, or cannot be split.
    """
    transform = transform or build_transform(False, options, data_config)
    dataset = _build_split(True, options, transform, load_image)
    return Part(dataset, _split(dataset, options)[1])


def _build_split(
    is_train: bool, options: DataOptions, transform: Callable, loader: Callable[[File], Image.Image]
) -> Dataset:
    """All training images, or all evaluation images."""
    if options.data_set == "wds":
        return _build_shards(is_train, options, transform, loader)
    root = _check_root(options)
    if options.data_set in ("CIFAR", "CIFAR10", "FMNIST"):
        return _build_torchvision(is_train, options, root, transform)
    if options.data_set in INAT_YEARS:
        category = options.inat_category
        return INaturalistJson(root, is_train, INAT_YEARS[options.data_set], category, transform, loader)
    if options.data_set == "IMNET-V2":
        if is_train:
            raise DataError("--data-set IMNET-V2 has no training images: it is to be evaluated on")
        return NumberedTree(root, transform, loader)
    classes = _tree_classes(options, root, is_train)
    if is_numbered(classes) and _find_split(root, "train") is None:
        _logger.warning(
            f"--data-path {root}: class folders named by numbers are sorted as text (0, 1, 10, 100), as in training on "
            "such folders; if they are ImageNet's labels, as in ImageNet-V2, give --data-set IMNET-V2 and the folder "
            "that holds them"
        )
    return _build_tree(root, "train" if is_train else "val", transform, loader)


class Part(Subset):
    """Some images of a data set, with the attributes that ``SkipBadImages``, ``fingerprint`` and captions read."""

    @property
    def classes(self) -> list[str]:
        """Names of the labels."""
        return self.dataset.classes

    @property
    def root(self) -> str | Path:
        """Where the images are."""
        return self.dataset.root

    @property
    def samples(self) -> list[tuple[File, int]] | archives.Members:
        """File and label of each image."""
        samples = self.dataset.samples
        if isinstance(samples, archives.Members):
            return archives.Members(samples.archives, samples.table[self.indices])
        return [samples[index] for index in self.indices]


def split_by_class(labels: np.ndarray, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Cuts images in two, class by class.

    Args:
        labels: Labels of the images, shape (num_images,).
        share: Share of the second part, above 0 and below 1. It gets at least one image of each class and never all.
        seed: Seed of the choice. What is chosen in one class does not depend on the other classes.

    Returns:
        Sorted indices of the two parts.

    Raises:
        ValueError: If a class has only one image; the message gives its label.
    """
    second: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise ValueError(f"class {label} has one image")
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        # Not Generator: the numbers of RandomState are the same in every version of numpy.
        rng = np.random.RandomState(np.random.SeedSequence((seed, int(label))).generate_state(1, np.uint32)[0])
        second += rng.permutation(members)[:count].tolist()
    held_out = set(second)
    return [index for index in range(len(labels)) if index not in held_out], sorted(second)


def _split(dataset: Dataset, options: DataOptions) -> tuple[list[int], list[int]]:
    """Indices of the images to train on, and of those that ``--val-split`` holds out."""
    if getattr(dataset, "remote", None) is not None:
        raise DataError(
            f"--val-split {options.val_split}: remote shards are read as they come and cannot be split; write a "
            "validation split of your own, or use local shards"
        )
    labels = dataset.samples.targets if isinstance(dataset, MemberImages) else dataset.targets
    try:
        return split_by_class(np.asarray(labels), options.val_split, options.val_split_seed)
    except ValueError as error:
        raise DataError(f"--val-split {options.val_split}: {error}, which cannot be split in two") from error


def _skip_bad_images(dataset: DatasetFolder, options: DataOptions) -> Dataset:
    limit = options.skip_bad_images
    if limit < 0:
        raise DataError(f"--skip-bad-images must not be negative, got {limit}")
    return SkipBadImages(dataset, limit) if limit else dataset


def _build_tree(root: Path, split: str, transform: Callable, loader: Callable[[File], Image.Image]) -> DatasetFolder:
    """Images of one split of a tree, unpacked or in an archive."""
    found = _find_split(root, split)
    if isinstance(found, Path):
        return ImageTree(found, transform, loader)
    empty = sorted(set(range(len(found.classes))) - set(found.members.targets.tolist()))
    if empty:
        names = shorten([found.classes[label] for label in empty])
        raise DataError(f"--data-path {root}: found no valid file for the classes {names} of {split}")
    return MemberImages(root, found.members, found.classes, transform, loader)


def _build_shards(
    is_train: bool, options: DataOptions, transform: Callable, loader: Callable[[File], Image.Image]
) -> MemberImages:
    root = _shards_root(options)
    split = shards.open_split(root, "train" if is_train else "val")
    # Without names of classes, --num-classes has to say how many there are.
    classes = split.classes or [str(label) for label in range(options.num_classes or 0)]
    if not shards.is_remote(root):
        return MemberImages(root, shards.local_members(split), classes, transform, loader)
    folder = options.shard_cache
    cache = Path(folder).expanduser() if folder else shards.default_cache()
    members = shards.RemoteMembers(split, cache, options.shard_cache_gb * 2**30)
    return MemberImages(root, members, classes, transform, loader)


def _shards_root(options: DataOptions) -> str:
    if not options.data_path:
        raise DataError("--data-path is missing: give the folder or the address of the shards")
    if shards.is_remote(options.data_path):
        return options.data_path
    root = Path(options.data_path).expanduser()
    if not root.is_dir():
        raise DataError(f"--data-path {root} is no folder: --data-set wds needs the folder or the address of shards")
    return str(root)


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Identifies a list of images by their number and the digest of names and labels.

    Names are relative to ``--data-path``, which may move. The content of the files is not read.

    Args:
        dataset: From ``build_dataset``; it may be wrapped.
    """
    while not hasattr(dataset, "samples") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    digest = hashlib.sha256()
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, archives.Members):
        digest.update(samples.table.tobytes())
    elif isinstance(samples, shards.RemoteMembers):
        digest.update(samples.shards.digest.encode())
    elif samples is not None:
        root = f"{dataset.root}{os.sep}"
        names = (f"{name.removeprefix(root)}\0{label}\n" for name, label in samples)
        digest.update(os.fsencode("".join(names)))
    else:  # in memory as a whole
        digest.update(np.asarray(dataset.targets).tobytes())
    return {"images": len(dataset), "digest": digest.hexdigest()}


def count_classes(options: DataOptions, is_train: bool = True) -> int:
    """Number of classes of ``--data-set`` at ``--data-path``, without listing images: a model can be built first.

    Args:
        options: As in ``build_dataset``.
        is_train: Whether the training images are needed; see ``build_dataset``.

    Raises:
        DataError: If the data are not there or not usable.
    """
    if options.data_set == "wds":
        root = _shards_root(options)
        unnamed = options.num_classes is not None and not shards.read_info(root)[0].get("classes")
        return options.num_classes if unnamed else len(shards.class_names(root))
    root = _check_root(options)
    if options.data_set in ("CIFAR", "CIFAR10", "FMNIST"):
        return NOMINAL_CLASSES[options.data_set]
    if options.data_set in INAT_YEARS:
        year = INAT_YEARS[options.data_set]
        return len(INaturalistJson(root, is_train, year, options.inat_category).classes)
    if options.data_set == "IMNET-V2":
        return len(numbered_folders(root))
    return len(_tree_classes(options, root, is_train))


def _check_root(options: DataOptions) -> Path:
    """``--data-path`` as a path that exists, unless the data are to be downloaded there."""
    if options.data_set not in DATA_SETS:
        raise DataError(f"--data-set {options.data_set} is unknown: choose one of {', '.join(DATA_SETS)}")
    if not options.data_path:
        raise DataError("--data-path is missing: give the folder of the images")
    root = Path(options.data_path).expanduser()
    archived = options.data_set in ("IMNET", "IMNET100", "FOLDER") and root.suffix.lower() in archives.SUFFIXES
    if root.exists() and not root.is_dir() and not archived:
        raise DataError(
            f"--data-path {root} is a file: give the folder of the images; trees with train/ and val/ may also be in "
            "a .tar or .zip, not compressed as a whole"
        )
    if not root.exists() and not options.download:
        raise DataError(f"--data-path {root} does not exist: give the folder of the images")
    return root


def _find_split(root: Path, split: str) -> Path | archives.Tree | None:
    """One split of a tree: the folder ``root/<split>``, else in ``root/<split>.tar`` or ``.zip``, or in ``root``."""
    if root.is_file():
        return archives.read_tree(root, split, alone=False)
    if (root / split).is_dir():
        return root / split
    found = next((path for suffix in archives.SUFFIXES if (path := root / f"{split}{suffix}").is_file()), None)
    return archives.read_tree(found, split, alone=True) if found else None


def _split_classes(root: Path, split: str) -> list[str] | None:
    """Class names of one split of a tree; None if there is no such split."""
    found = _find_split(root, split)
    if isinstance(found, archives.Tree) and not found.classes:
        raise DataError(
            f"--data-path {root}: the archive's {split} holds no folders: it should have one for each class"
        )
    return class_folders(found) if isinstance(found, Path) else found and found.classes


def _tree_classes(options: DataOptions, root: Path, is_train: bool) -> list[str]:
    """Class names of a tree with ``train/`` and ``val/``, after checking that both have the same.

    Labels are positions in the sorted names, so a folder that is missing on one side would shift all labels after it.
    Evaluation needs no ``train/`` if ``val/`` has as many classes as the named data set.
    """
    found = {split: _split_classes(root, split) for split in ("train", "val")}
    if not is_train and found["train"] is None and len(found["val"] or ()) == NOMINAL_CLASSES.get(options.data_set):
        return found["val"]
    for split, classes in found.items():
        if classes is None:
            beside = f" and no {split}.tar or {split}.zip" if root.is_dir() else ""
            raise DataError(
                f"--data-path {root} has no folder {split}/{beside}: --data-set {options.data_set} needs "
                "train/<class>/ and val/<class>/ with the images of each class"
            )
    if found["train"] != found["val"]:
        differences = [
            f"only in {split}/: {shorten(sorted(set(found[split]) - set(found[other])))}"
            for split, other in (("train", "val"), ("val", "train"))
            if set(found[split]) - set(found[other])
        ]
        raise DataError(
            f"--data-path {root}: train/ and val/ must have the same class folders, or labels would shift; "
            f"{'; '.join(differences)}: add or remove these"
        )
    return found["train"]


def _build_torchvision(is_train: bool, options: DataOptions, root: Path, transform: Callable) -> VisionDataset:
    """CIFAR-10, CIFAR-100 or Fashion-MNIST, read into memory as a whole."""
    if options.data_set == "FMNIST":
        transform = transforms.Compose([to_rgb, transform])
        if fashion_mnist_file(root, "train-images-idx3-ubyte").is_file():
            return FlatFashionMNIST(root, is_train, transform)
        builder = FashionMNIST
        hint = (
            "train-images-idx3-ubyte.gz and its three companions (Debian: apt-get install dataset-fashion-mnist, "
            "then --data-path /usr/share/datasets/fashion-mnist), or torchvision's FashionMNIST/raw/"
        )
    else:
        builder = CIFAR10 if options.data_set == "CIFAR10" else CIFAR100
        hint = f"the folder {builder.base_folder}/, unpacked from {builder.url}"
    try:
        return builder(root, train=is_train, transform=transform, download=options.download)
    except (RuntimeError, OSError, ValueError, TypeError, LookupError, EOFError, AssertionError) as error:
        raise DataError(
            f"--data-set {options.data_set} is not usable at --data-path {root} ({error}): "
            f"put there {hint}; or pass --download where the network allows it"
        ) from error
