"""Images: which files make up a data set, how they become tensors, and how they are loaded.

A file is a path, or a ``Member`` of an archive or a shard that is read in place (``archives.py``, ``shards.py``).

``DataOptions`` says which images and how they are augmented, with DeiT's names and defaults. Whatever is wrong with the
data is a ``DataError`` of one sentence that names the flag, the path and the way out.
"""

import gzip
import hashlib
import io
import json
import logging
import multiprocessing
import os
import tempfile
import warnings
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, DatasetFolder, FashionMNIST, ImageFolder, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
from torchvision.datasets.mnist import read_image_file, read_label_file

from readers import archives, shards
from readers.archives import DataError, Member
from readers.files import read_file

_logger = logging.getLogger(__name__)

# Number of classes each data set is known for; the trees on disk are counted and may hold another number.
NOMINAL_CLASSES = {
    "IMNET": 1000,
    "IMNET100": 100,
    "CIFAR": 100,
    "CIFAR10": 10,
    "FMNIST": 10,
    "INAT": 8142,
    "INAT19": 1010,
}
DATA_SETS = (*NOMINAL_CLASSES, "FOLDER", "wds")
INAT_YEARS = {"INAT": 2018, "INAT19": 2019}
AUTO_AUGMENT_FAMILIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")

# Formats that are opened, whatever a file is called: those of torchvision's extensions, and what is found under them.
# Pillow knows 40 more, some of which start a program (EPS) or fail in ways of their own.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MAX_JSON, MAX_IDX = 1 << 30, 64 << 20  # bytes of iNaturalist's annotations, and of one of Fashion-MNIST's files
MAX_ASPECT = 100  # of the longer side to the shorter, which an evaluation resizes to 256 pixels
# Pillow's own limit for a picture is 179 million pixels, 1.4 GB while it is converted. No picture of more than
# PLAIN_PIXELS has less than a byte for so many of them, other than one that is made to take memory.
PLAIN_PIXELS, PIXELS_A_BYTE = 1 << 24, 1000


File = str | Member


class BadImageError(DataError):
    """One image file cannot be read."""


@dataclass(frozen=True)
class DataOptions:
    """Which images, and what becomes of them. The names are those of main.py's flags, and so are the defaults."""

    data_set: str = "IMNET"  # one of DATA_SETS
    data_path: str = ""
    inat_category: str = "name"
    num_classes: int | None = None  # of shards that do not name their classes
    download: bool = False
    skip_bad_images: int = 0
    shard_cache: str = ""
    shard_cache_gb: float = 64.0
    input_size: int = 224
    # Training: DeiT's recipe.
    color_jitter: float = 0.4  # only where aa is off
    hflip: float = 0.5
    aa: str | None = "rand-m9-mstd0.5-inc1"  # "none" or "" switches it off
    train_interpolation: str = "bicubic"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    # Evaluation.
    eval_crop_ratio: float | None = None  # None: the model's own crop_pct
    val_split: float = 0.0  # share of the training images of each class that is held out; 0: none
    val_split_seed: int = 0

    @classmethod
    def from_args(cls, args: Namespace) -> "DataOptions":
        """Those that a command's parsed arguments have."""
        given = vars(args)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


# ----------------------------------------------------------------------------------------------------------- transforms


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
        shorter, longer = sorted(image.size)
        if longer > MAX_ASPECT * shorter:
            raise ValueError(f"it has {image.size[0]} x {image.size[1]} pixels, more than {MAX_ASPECT} to 1")
        if shorter * longer > max(PLAIN_PIXELS, PIXELS_A_BYTE * len(content)):
            raise ValueError(f"{len(content)} bytes declare {image.size[0]} x {image.size[1]} pixels")
        return image


def decode(image: Image.Image) -> Image.Image:
    """Reads the rest of an image from :func:`open_image` as RGB and closes its file; a decoded one is only converted.

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
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it has limits of its own
        try:
            yield
        except MemoryError:  # not the file's fault: sizes are limited
            raise
        except Exception as error:  # on damaged files the decoders fail in any way
            raise BadImageError(
                f"cannot read image {archives.shown(path)} ({archives.brief(error)}): repair or remove it, "
                "or pass --skip-bad-images N to skip up to N such images"
            ) from error


def build_transform(
    is_train: bool, options: DataOptions, data_config: dict[str, Any] | None = None, *, as_image: bool = False
) -> transforms.Compose:
    """Transform from an RGB image of any size to a normalised float tensor of shape (3, input_size, input_size).

    Args:
        is_train: Whether to augment with DeiT's recipe. Otherwise the shorter side is resized to
            ``floor(input_size / crop_pct)`` and the centre is cropped.
        options: Up to 32 pixels training and evaluation resize to ``input_size``, and training crops with a padding
            of 4 instead of cropping and resizing.
        data_config: ``timm.data.resolve_data_config({}, model=model)``: ``mean``, ``std``, ``crop_pct`` and
            ``interpolation`` (of the evaluation). None: timm's defaults, those of ImageNet.
        as_image: Whether the training transform ends with the augmented image, not yet a tensor.

    Raises:
        DataError: If ``aa`` or ``eval_crop_ratio`` has no meaning.

    Source: DeiT's recipe, arXiv 2012.12877, table 9.
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
            auto_augment=_auto_augment_policy(options.aa),
            interpolation=options.train_interpolation,
            mean=config["mean"],
            std=config["std"],
            re_prob=options.reprob,
            re_mode=options.remode,
            re_count=options.recount,
        )
        if small:
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
    return create_transform(
        input_size=options.input_size,
        is_training=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=1.0 if small else crop_ratio,
    )


def _auto_augment_policy(aa: str | None) -> str | None:
    """timm's policy string of ``--aa``, or None where it is switched off."""
    if aa is None or aa.strip().lower() in ("", "none"):
        return None
    if aa.split("-")[0] not in AUTO_AUGMENT_FAMILIES:
        raise DataError(
            f"--aa {aa!r} is no augmentation policy: use for example 'rand-m9-mstd0.5-inc1', 'original', or 'none'"
        )
    for section in aa.split("-")[1:]:  # timm passes over those
        if not section.startswith("t") and not any(map(str.isdigit, section)):
            raise DataError(f"--aa {aa!r}: {section!r} has no number: use for example 'rand-m9-mstd0.5-inc1'")
    return aa


# ------------------------------------------------------------------------------------------------------------ data sets


class ImageTree(ImageFolder):
    """Images of the tree ``root/<class>/**/*.jpg``, labelled by the sorted folder names.

    Hidden folders (``.ipynb_checkpoints``) are no classes, and unreadable files raise ``BadImageError``.

    Args:
        root: Folder of the class folders.
        transform: Applied to the image that ``loader`` returns.
        loader: ``load_image``, or ``open_image`` for a transform that decodes.
    """

    def __init__(
        self, root: str | Path, transform: Callable | None = None, loader: Callable[[File], Image.Image] = load_image
    ) -> None:
        super().__init__(root, transform=transform, loader=loader)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Class names in label order, and their labels."""
        classes = class_folders(Path(directory))
        return classes, {name: label for label, name in enumerate(classes)}

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:
        """(path, label) of the images in ``ImageFolder``'s order; links are followed, but no folder is entered twice.

        Raises:
            DataError: If a class has no images, or a folder cannot be listed.
        """
        samples, empty = [], []
        for name, label in sorted(class_to_idx.items()):
            found = [
                (os.path.join(folder, file), label)
                for folder, files in sorted(_walk(os.path.join(directory, name)))
                for file in sorted(files)
                if file.lower().endswith(IMG_EXTENSIONS)
            ]
            samples += found
            empty += [name] if not found else []
        if empty:
            raise DataError(
                f"--data-path {directory}: found no valid file for the classes {_shorten(empty)}; supported are "
                f"{', '.join(IMG_EXTENSIONS)}"
            )
        return samples


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Folders and the names of their files; one that links lead to again, as ``loop -> .`` does, is left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"--data-path: {error.filename} cannot be listed ({error.strerror})") from error

    seen = set()
    for folder, below, files in os.walk(top, followlinks=True, onerror=refuse):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            _logger.warning(f"--data-path: {folder} is a link to a folder of the same class: left out")
            below.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        below.sort()
        yield folder, files


class MemberImages(DatasetFolder):
    """Images inside archives or shards.

    Args:
        root: Where they are, for messages.
        members: (:class:`Member`, label) of each.
        classes: Names in label order.
        transform: Applied to the image that ``loader`` returns.
        loader: As in ``ImageTree``.
    """

    def __init__(
        self,
        root: str | Path,
        members: archives.Members | shards.RemoteMembers,
        classes: list[str],
        transform: Callable | None = None,
        loader: Callable[[File], Image.Image] = load_image,
    ) -> None:
        # Not DatasetFolder's constructor, which would look for class folders.
        VisionDataset.__init__(self, str(root), transform=transform)
        self.loader = loader
        self.extensions = None
        self.samples = members
        self.classes = classes
        self.remote = members if isinstance(members, shards.RemoteMembers) else None


class FlatFashionMNIST(VisionDataset):
    """Fashion-MNIST from a plain folder of its four files, compressed or not, as Debian ships them.

    Args:
        root: Folder with ``{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]``.
        train: Whether to read the 60,000 training images or the 10,000 of the test set.
        transform: Applied to the grey-scale image.

    Raises:
        DataError: If a file is damaged.
    """

    classes = FashionMNIST.classes

    def __init__(self, root: str | Path, train: bool, transform: Callable | None = None) -> None:
        super().__init__(root, transform=transform)
        prefix = "train" if train else "t10k"
        self.data = self._read(f"{prefix}-images-idx3-ubyte", read_image_file).numpy()
        self.targets = self._read(f"{prefix}-labels-idx1-ubyte", read_label_file).tolist()
        if len(self.data) != len(self.targets):
            raise DataError(f"--data-path {root}: {len(self.data)} images of {prefix} have {len(self.targets)} labels")
        if self.data.ndim != 3 or max(self.targets, default=0) >= len(self.classes):
            raise DataError(f"--data-path {root}: the files of {prefix} are none of Fashion-MNIST: fetch them again")

    def _read(self, name: str, reader: Callable[[str], Tensor]) -> Tensor:
        path = fashion_mnist_file(Path(self.root), name)
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rb") as source, tempfile.NamedTemporaryFile() as plain:  # torchvision reads no .gz
                plain.write(source.read(MAX_IDX))
                plain.flush()
                return reader(plain.name)
        except (OSError, EOFError, zlib.error, AssertionError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"--data-path: {path} is cut short or not in IDX format ({type(error).__name__}): fetch it again"
            ) from error

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.data[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def __len__(self) -> int:
        return len(self.data)


class INaturalistJson(DatasetFolder):
    """iNaturalist 2018 or 2019 as described by its json files, labelled at a chosen level of the taxonomy.

    ``root`` holds ``train<year>.json``, ``val<year>.json``, ``categories.json`` (a list of the categories with a
    name for each level) and the images at the paths the json files give, with or without the super-category's folder.
    Labels count the names of the level in the order in which the training annotations mention them, as in DeiT.

    Args:
        root: Folder of the json files.
        train: Whether to read the training images.
        year: 2018 or 2019.
        category: Level: kingdom, phylum, class, order, supercategory, family, genus or name.
        transform: Applied to the image that ``loader`` returns.
        loader: As in ``ImageTree``.

    Raises:
        DataError: If a file is missing or is not what it should be.
    """

    def __init__(
        self,
        root: str | Path,
        train: bool,
        year: int,
        category: str = "name",
        transform: Callable | None = None,
        loader: Callable[[File], Image.Image] = load_image,
    ) -> None:
        # Not DatasetFolder's constructor, which would look for class folders.
        VisionDataset.__init__(self, root, transform=transform)
        self.loader = loader
        self.extensions = None
        self.category = category
        split_file = Path(root) / f"{'train' if train else 'val'}{year}.json"
        names = self._names(Path(root) / "categories.json")
        train_file = Path(root) / f"train{year}.json"
        train_split = _read_json(train_file)
        try:
            ordered = [names[annotation["category_id"]] for annotation in train_split["annotations"]]
            self.classes = list(dict.fromkeys(ordered))
            self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
            split = train_split if train else _read_json(split_file)
            categories = {annotation["image_id"]: annotation["category_id"] for annotation in split["annotations"]}
            files = [image["file_name"] for image in split["images"]]
            self.targets = [self.class_to_idx[names[categories[image["id"]]]] for image in split["images"]]
            if not all(isinstance(name, str) for name in files):
                raise TypeError("a file_name")
        except (LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"--data-path: {train_file} and {split_file} do not fit together with categories.json: "
                f"{error} is missing; use the files of one year's challenge"
            ) from error
        if not files:
            raise DataError(f"--data-path: {split_file} lists no images")
        self.samples = list(zip(self._locate(files), self.targets, strict=True))

    def _names(self, path: Path) -> dict[int, str]:
        """Name of every category id at the chosen level; without ids the position in the list counts."""
        try:
            return {entry.get("id", i): entry[self.category] for i, entry in enumerate(_read_json(path))}
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"--inat-category {self.category}: {path} has no such level for every category ({error})"
            ) from error

    def _locate(self, files: list[str]) -> list[str]:
        """Paths of the images: as listed, or without the super-category's folder if the first is found there."""
        if not Path(self.root, files[0]).is_file():
            short = ["/".join(np.delete(file.split("/"), 1)) if file.count("/") == 3 else file for file in files]
            if Path(self.root, short[0]).is_file():
                files = short
        return [os.path.join(self.root, file) for file in files]


class SkipBadImages(Dataset):
    """Replaces unreadable images by the next sample that can be read, up to a limit.

    Different bad images are counted, over all workers of this process and all epochs; each is named in a warning once.
    The replacement depends on the data set alone, never on the workers.

    Args:
        dataset: Data set that raises ``BadImageError``.
        limit: Number of bad images to skip.

    Raises:
        BadImageError: From ``__getitem__``, for the bad image after the last that may be skipped.
    """

    def __init__(self, dataset: DatasetFolder, limit: int) -> None:
        self.dataset = dataset
        self.limit = limit
        self.classes = dataset.classes
        self.remote = getattr(dataset, "remote", None)
        self._count = multiprocessing.Value("l", 0)
        self._is_bad = multiprocessing.Array("b", len(dataset), lock=False)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for offset in range(len(self.dataset)):
            candidate = (index + offset) % len(self.dataset)
            try:
                return self.dataset[candidate]
            except BadImageError as error:
                self._skip(candidate, error)
        raise DataError(f"--skip-bad-images {self.limit}: none of the {len(self.dataset)} images can be read")

    def _skip(self, index: int, error: BadImageError) -> None:
        with self._count.get_lock():
            if self._is_bad[index]:
                return
            if self._count.value >= self.limit:
                raise BadImageError(f"more than --skip-bad-images {self.limit} bad images: {error}") from error
            self._is_bad[index] = True
            self._count.value += 1
            count = self._count.value
        path = self.dataset.samples[index][0]
        warnings.warn(f"skipped bad image {count} of at most {self.limit}: {path}", stacklevel=3)

    def __len__(self) -> int:
        return len(self.dataset)


def build_dataset(
    is_train: bool,
    options: DataOptions,
    data_config: dict[str, Any] | None = None,
    *,
    transform: Callable | None = None,
    loader: Callable[[File], Image.Image] = load_image,
) -> tuple[Dataset, int]:
    """Data set of the training or the evaluation images, and the number of classes.

    With ``val_split``, training images lack those that :func:`build_held_out` has.

    Args:
        is_train: Whether to build the training set with its augmentation.
        options: Which images, and what becomes of them.
        data_config: As in ``build_transform``.
        transform: In place of ``build_transform``'s.
        loader: Reads a file for it: ``load_image``, or ``open_image`` for a transform that decodes.

    Returns:
        The data set, whose items are (tensor of shape (3, input_size, input_size), label), and its number of classes,
        counted, not assumed; compare with ``NOMINAL_CLASSES``.

    Raises:
        DataError: If the data are not there or not usable.
    """
    transform = transform or build_transform(is_train, options, data_config)
    dataset = _build_split(is_train, options, transform, loader)
    if is_train and options.val_split:
        dataset = Part(dataset, _split(dataset, options)[0])
    return _skip_bad_images(dataset, options), len(dataset.classes)


def build_held_out(options: DataOptions, data_config: dict[str, Any] | None = None) -> Dataset:
    """The training images that ``val_split`` keeps from training, transformed as evaluation images are.

    Args:
        options: With a ``val_split`` above 0.
        data_config: As in ``build_transform``.

    Raises:
        DataError: If the data are not there, or cannot be split.
    """
    dataset = _build_split(True, options, build_transform(False, options, data_config), load_image)
    return _skip_bad_images(Part(dataset, _split(dataset, options)[1]), options)


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
    _tree_classes(options, root, is_train)
    return _build_tree(root, "train" if is_train else "val", transform, loader)


class Part(Subset):
    """Some images of a data set, with what ``SkipBadImages``, ``fingerprint`` and captions read of a whole one."""

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
        labels: Of the images, shape (num_images,).
        share: Of the second part, above 0 and below 1; of each class it gets at least one image and never all.
        seed: Of the choice, which depends on nothing else: the choice in one class not on the others.

    Returns:
        Sorted indices of the two parts.

    Raises:
        ValueError: If a class has one image only; with its label.
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
        names = _shorten([found.classes[label] for label in empty])
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
    """Says whether two data sets are the same list of images: their number, and the digest of names and labels.

    Names are relative to ``--data-path``, which may move. What is in the files is not looked at.

    Args:
        dataset: From ``build_dataset``, also wrapped.
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
    return len(_tree_classes(options, root, is_train))


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the class folders in a folder; hidden ones are none.

    Raises:
        DataError: If there are none.
    """
    try:
        classes = [name for name in find_classes(folder)[0] if not name.startswith(".")]
    except FileNotFoundError:
        classes = []
    except OSError as error:
        raise DataError(f"--data-path: {folder} cannot be listed ({error.strerror})") from error
    if not classes:
        raise DataError(f"--data-path: {folder} is empty: it should hold one folder of images for each class")
    return classes


def fashion_mnist_file(folder: Path, name: str) -> Path:
    """Path of one of Fashion-MNIST's files, the compressed one where the other is absent."""
    path = folder / name
    return path if path.is_file() else folder / f"{name}.gz"


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
    Evaluation does without ``train/`` where ``val/`` has every class the named data set is known for.
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
            f"only in {split}/: {_shorten(sorted(set(found[split]) - set(found[other])))}"
            for split, other in (("train", "val"), ("val", "train"))
            if set(found[split]) - set(found[other])
        ]
        raise DataError(
            f"--data-path {root}: train/ and val/ must have the same class folders, or labels would shift; "
            f"{'; '.join(differences)}: add or remove these"
        )
    return found["train"]


def _shorten(names: list[str], limit: int = 10) -> str:
    """Comma-separated names, the first few of many."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_file(path, MAX_JSON))
    except FileNotFoundError as error:
        raise DataError(f"--data-path: {path} is missing: unpack the challenge's annotations there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--data-path: {path} is not readable as json ({error}): fetch it again") from error
