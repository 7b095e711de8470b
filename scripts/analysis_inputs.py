"""What an analysis works on: models with their weights, and the images, once for each kind of input."""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS

import checkpoints
import models  # noqa: F401  (registers the zoo with timm)
import probe
import weights
from datasets import DataError, build_dataset, build_transform, load_image

RANDOM_WEIGHTS = "as initialised"


@dataclass
class ModelSpec:
    """One --model with the flags that follow it."""

    name: str
    label: str | None = None
    resume: str | None = None
    pretrained: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Subject:
    """A model under analysis."""

    spec: ModelSpec
    label: str
    model: nn.Module
    data_config: dict[str, Any]
    input_size: int
    layers: list[probe.Layer]

    @property
    def weights(self) -> str:
        """Where the weights come from, in words."""
        return self.spec.resume or (
            f"pretrained, {self.data_config['tag']}" if self.spec.pretrained else RANDOM_WEIGHTS
        )


def build_subject(spec: ModelSpec, label: str, args: argparse.Namespace, device: torch.device) -> Subject:
    """Builds a model, loads its weights strictly and finds its layers.

    A checkpoint written by main.py knows its --model-kwargs and --input-size; flags of this command win over them.

    Raises:
        probe.UnsupportedModelError: If the model's attention cannot be recomputed.
        checkpoints.CheckpointError: If the weights are not those of this model.
    """
    checkpoint = checkpoints.read(spec.resume) if spec.resume else {}
    trained_with = checkpoint.get("args") or {}
    kwargs = {**(trained_with.get("model_kwargs") or {}), **spec.kwargs}
    input_size = args.input_size or trained_with.get("input_size")
    if input_size and timm.get_pretrained_cfg(spec.name).fixed_input_size:
        kwargs.setdefault("img_size", input_size)
    if checkpoint:
        kwargs.setdefault("num_classes", weights.number_of_classes(checkpoint["model"]))
    torch.manual_seed(args.seed)
    model = timm.create_model(spec.name, pretrained=spec.pretrained, **kwargs)
    if checkpoint:
        weights.load_weights(model, checkpoint["model"], source=spec.resume)
    layers = probe.find_layers(model)
    data_config = resolve_data_config({}, model=model, verbose=False)
    data_config["tag"] = model.pretrained_cfg.get("tag") or model.pretrained_cfg.get("hf_hub_id") or "default weights"
    size = kwargs.get("img_size") or input_size or data_config["input_size"][-1]
    return Subject(spec, label, model.to(device).eval(), data_config, size, layers)


def unique_labels(specs: Sequence[ModelSpec]) -> list[str]:
    """A label for each model: --label or the model's name, numbered where several are equal."""
    names = [spec.label or spec.name for spec in specs]
    return [
        name if names.count(name) == 1 else f"{name} #{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


class ImageFiles(Dataset):
    """The images of any folder; labels are of no use here, so it need not be a tree of classes.

    Args:
        root: Folder, searched with its sub-folders; its ``val/`` alone if it has one.
        transform: Applied to the RGB image.

    Raises:
        DataError: If there are no images.
    """

    def __init__(self, root: Path, transform: Callable[[Any], Tensor]) -> None:
        root = root / "val" if (root / "val").is_dir() else root
        self.files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        self.transform = transform
        if not self.files:
            raise DataError(f"--data-path {root}: no images ({', '.join(IMG_EXTENSIONS)}): give a folder that has some")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(load_image(str(self.files[index]))), 0

    def __len__(self) -> int:
        return len(self.files)


class Views(Dataset):
    """The same image once per kind of input that the models want.

    Args:
        datasets: Data sets of the same images with different transforms.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = datasets

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(dataset[index][0] for dataset in self.datasets)

    def __len__(self) -> int:
        return len(self.datasets[0])


def input_kind(subject: Subject) -> tuple:
    """Two models with the same kind of input share one decoded and transformed image."""
    config = subject.data_config
    return subject.input_size, config["mean"], config["std"], config["crop_pct"], config["interpolation"]


def with_input_size(args: argparse.Namespace, input_size: int) -> argparse.Namespace:
    """The arguments as the functions of datasets.py read them for one model."""
    args = copy.copy(args)
    args.input_size = input_size
    return args


def build_loader(args: argparse.Namespace, subjects: Sequence[Subject]) -> tuple[DataLoader, list[int]]:
    """Loader of the chosen images, and for each model which of a batch's views is its input."""
    kinds: dict[tuple, int] = {}
    datasets = []
    for subject in subjects:
        if kinds.setdefault(input_kind(subject), len(datasets)) == len(datasets):
            own_args = with_input_size(args, subject.input_size)
            if args.data_set:
                datasets.append(build_dataset(False, own_args, subject.data_config)[0])
            else:
                transform = build_transform(False, own_args, subject.data_config)
                datasets.append(ImageFiles(Path(args.data_path).expanduser(), transform))
    views = Views(datasets)
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(args.seed))
    chosen = Subset(views, sorted(order[: args.num_images or None].tolist()))
    loader = DataLoader(chosen, batch_size=args.batch_size, num_workers=args.num_workers)
    return loader, [kinds[input_kind(subject)] for subject in subjects]
