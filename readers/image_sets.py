"""Data sets of image files: trees of folders, members of archives, and the layouts of some data sets."""

import gzip
import json
import logging
import multiprocessing
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder, FashionMNIST, ImageFolder, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
from torchvision.datasets.mnist import read_image_file, read_label_file

from . import archives, shards
from .archives import DataError
from .files import read_file
from .images import BadImageError, File, load_image

_logger = logging.getLogger(__name__)

MAX_JSON, MAX_IDX = 1 << 30, 64 << 20  # bytes of iNaturalist's annotations, and of one of Fashion-MNIST's files


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
                f"--data-path {directory}: found no valid file for the classes {shorten(empty)}; supported are "
                f"{', '.join(IMG_EXTENSIONS)}"
            )
        return samples


class NumberedTree(ImageTree):
    """Images of the tree ``root/<label>/**/*.jpg``, as ImageNet-V2 comes: a folder's name is its label, from 0 on.

    ``ImageTree`` would sort these names as text (0, 1, 10, 100), which gives wrong labels from the third class on.
    """

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Class names in label order, and their labels."""
        classes = numbered_folders(Path(directory))
        return classes, {name: int(name) for name in classes}


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Folders and the names of their files; a folder that a link leads to again (``loop -> .``) is left out."""

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
    Labels number the names of the level in the order of their first mention in the training annotations, as in DeiT.

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
        """Name of every category id at the chosen level; an entry without an id has its position in the list as id."""
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

    Each bad image counts once, over all workers of this process and all epochs, and is named in one warning.
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


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the class folders in a folder, without hidden ones.

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


def numbered_folders(folder: Path) -> list[str]:
    """Names of class folders that are their labels, in this order: ``["0", "1", "2", ...]``.

    Raises:
        DataError: If folders have other names, or a number is missing.
    """
    found = set(class_folders(folder))
    wanted = list(map(str, range(len(found))))
    if others := sorted(found - set(wanted)):
        missing = [name for name in wanted if name not in found]
        raise DataError(
            f"--data-path {folder}: class folders must be the numbers from 0 on, without a gap; there are {len(found)} "
            f"folders, among them {shorten(others)}, and no {shorten(missing)}: give the folder that holds 0, 1, 2 and "
            "so on, complete"
        )
    return wanted


def is_numbered(classes: list[str]) -> bool:
    """Whether class names are the numbers from 0 on, and sorting them as text changes their order."""
    return len(classes) > 10 and set(classes) == set(map(str, range(len(classes))))


def fashion_mnist_file(folder: Path, name: str) -> Path:
    """Path of one of Fashion-MNIST's files; the compressed one if the plain one is absent."""
    path = folder / name
    return path if path.is_file() else folder / f"{name}.gz"


def shorten(names: list[str], limit: int = 10) -> str:
    """Comma-separated names, the first few of many."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_file(path, MAX_JSON))
    except FileNotFoundError as error:
        raise DataError(f"--data-path: {path} is missing: unpack the challenge's annotations there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--data-path: {path} is not readable as json ({error}): fetch it again") from error
