"""Runs models over images and keeps the running statistics of every quantity in every layer."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import probe, spectrum
from .results import Result, RunningMean, Values
from .subject import Subject


class Measurement:
    """Running statistics of every quantity in every layer of one model; its size does not depend on the images.

    Args:
        subject: The model.
        patches_only: Whether class, distillation and register tokens are left out of the feature quantities.
    """

    def __init__(self, subject: Subject, patches_only: bool = False) -> None:
        self.subject = subject
        self.patches_only = patches_only
        self.layers: list[dict[str, RunningMean]] = [{} for _ in subject.layers]
        self._num_patches = 0
        self._frequencies: dict[tuple[int, str], list[float]] = {}
        self._previous: Tensor | None = None

    def update(self, images: Tensor) -> None:
        """Runs the model on images of shape (B, 3, H, W) and adds what each layer does."""
        self._num_patches = math.prod(probe.patch_grid(self.subject.model, images))
        with torch.inference_mode(), probe.visiting(self.subject.model, self._visit):
            self.subject.model(images)

    def _visit(self, view: probe.LayerView) -> None:
        # One layer's maps are alive at a time, and of the layer before only the average over its heads.
        maps = view.attention_maps()
        previous = self._previous if view.index > 0 else None
        statistics = probe.feature_statistics(view, self._num_patches, self.patches_only)
        statistics |= probe.map_statistics(maps, previous)
        self._previous = maps.applied.mean(dim=1)
        self._frequencies[view.index, "spectrum"] = spectrum.frequencies(maps.applied.shape[-1]).tolist()
        patches = view.patch_tokens(self._num_patches)
        if patches is not None:
            grid = round(patches.shape[1] ** 0.5)
            self._frequencies[view.index, "delta_log_amplitude"] = spectrum.patch_frequencies(grid).tolist()
        for name, values in statistics.items():
            self.layers[view.index].setdefault(name, RunningMean()).update(values)

    def results(self) -> list[dict[str, Values]]:
        """For each layer, every quantity and parameter."""
        layers = []
        for index, (quantities, layer) in enumerate(zip(self.layers, self.subject.layers, strict=True)):
            values = {
                name: Values(running.mean.cpu(), running.std.cpu(), running.count, self._frequencies.get((index, name)))
                for name, running in quantities.items()
            }
            parameters = {name: Values(p.double().cpu()) for name, p in probe.layer_parameters(layer).items()}
            layers.append(values | parameters)
        return layers

    def result(self) -> Result:
        """Everything that was measured, with what it was measured on."""
        subject = self.subject
        return Result(
            subject.label,
            subject.name,
            subject.weights,
            sum(p.numel() for p in subject.model.parameters()),
            subject.input_size,
            [layer.name for layer in subject.layers],
            self.results(),
        )


def measure(
    subjects: Sequence[Subject], batches: Iterable[Sequence[Tensor]], patches_only: bool = False
) -> list[Result]:
    """One pass over the images, through all models.

    Args:
        subjects: The models, each in the mode and on the device where it is to be measured.
        batches: Each holds one input for each model, images of shape (B, 3, H, W).
        patches_only: Whether class, distillation and register tokens are left out of the feature quantities.
    """
    measurements = [Measurement(subject, patches_only) for subject in subjects]
    for batch in batches:
        for measurement, images in zip(measurements, batch, strict=True):
            measurement.update(images)
    return [measurement.result() for measurement in measurements]
