"""The subject of an analysis: a model, where its weights come from, and the layers to measure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..attention import AttentionLayer
from ..convert import remedy_options
from ..weights import ModelError, create_model, model_from_checkpoint, read_checkpoint, trained_with
from . import probe

RANDOM_WEIGHTS = "as initialised"


@dataclass
class ModelSpec:
    """A model by name, and where its weights come from."""

    name: str
    label: str | None = None
    resume: str | None = None
    pretrained: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    remedy: list[str] = field(default_factory=list)  # names for add_remedy; empty: as the checkpoint says
    remedy_kwargs: dict[str, Any] = field(default_factory=dict)  # see remedy_options


@dataclass
class Subject:
    """A model under analysis."""

    label: str
    name: str
    weights: str  # where they come from, in words
    model: nn.Module
    data_config: dict[str, Any]
    input_size: int
    layers: list[AttentionLayer]

    def as_picture(self, image: Tensor) -> Tensor:
        """A transformed image (3, H, W) as a viewable picture, (H, W, 3) in [0, 1], on the CPU."""
        mean, std = (torch.tensor(self.data_config[name])[:, None, None] for name in ("mean", "std"))
        return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def build_subject(
    spec: ModelSpec, label: str, *, device: torch.device, input_size: int | None = None, seed: int = 0
) -> Subject:
    """Builds a model, loads its weights strictly and finds its layers.

    Args:
        spec: The model.
        label: Its name in the figures.
        device: The device to run it on.
        input_size: Side of the images in pixels; None: as the checkpoint says, else the model's own.
        seed: Of the initial weights.

    Raises:
        UnsupportedModelError: If the model's attention cannot be recomputed.
        CheckpointError: If the weights do not fit the model.
        ModelError: If there is no such model, it cannot be built, or its published weights cannot be downloaded.
    """
    torch.manual_seed(seed)
    remedies = remedy_options(spec.remedy, spec.remedy_kwargs)
    if spec.resume:
        checkpoint = read_checkpoint(spec.resume)
        input_size = input_size or trained_with(checkpoint).get("input_size")
        given = dict(source=spec.resume, name=spec.name, input_size=input_size, model_kwargs=spec.kwargs)
        model = model_from_checkpoint(checkpoint, remedies=remedies or None, **given)
    else:
        given = dict(input_size=input_size, model_kwargs=spec.kwargs, remedies=remedies)
        try:
            model = create_model(spec.name, pretrained=spec.pretrained, **given)
        except ModelError as error:
            if spec.pretrained and isinstance(error.__cause__, OSError):  # as those of the network and the cache are
                raise ModelError(
                    f"--model {spec.name} --pretrained: the published weights cannot be downloaded "
                    f"({error.__cause__}): check the network, or give --resume FILE with weights on this machine"
                ) from error
            raise
    config = resolve_data_config({}, model=model, verbose=False)
    tag = model.pretrained_cfg.get("tag") or model.pretrained_cfg.get("hf_hub_id") or "default weights"
    weights = spec.resume or (f"pretrained, {tag}" if spec.pretrained else RANDOM_WEIGHTS)
    size = spec.kwargs.get("img_size") or input_size or config["input_size"][-1]
    return Subject(label, spec.name, weights, model.to(device).eval(), config, size, probe.find_layers(model))


def subject_of(model: nn.Module, label: str, input_size: int | None = None) -> Subject:
    """The subject for an existing model; its mode and device are not changed.

    Args:
        model: Any model :func:`probe.find_layers` accepts.
        label: Its name in the figures.
        input_size: Side of the images in pixels; None: the model's own.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    config = resolve_data_config({}, model=model, verbose=False)
    size = input_size or config["input_size"][-1]
    return Subject(label, name, "as given", model, config, size, probe.find_layers(model))


def unique_labels(specs: Sequence[ModelSpec]) -> list[str]:
    """A label for each model: its own or the model's name, numbered where several are equal."""
    names = [spec.label or spec.name for spec in specs]
    return [
        name if names.count(name) == 1 else f"{name} #{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]
