"""Runs models over images and keeps the running statistics of every quantity in every layer."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import probe
from .paired import PairedDifferences
from .quantities import DEFAULT, choose
from .results import Result
from .subject import Subject
from .values import RunningMean, Values


class Measurement:
    """Running statistics of every quantity in every layer of one model; memory is independent of the image count.

    ``batch`` holds, for each layer, the last batch's quantities without a spectrum or profile: one number per image,
    head or window.

    Args:
        subject: The model.
        patches_only: Whether class, distillation and register tokens are left out of the feature quantities.
        quantities: Names of the groups to measure (``quantities.GROUPS``).
    """

    def __init__(self, subject: Subject, patches_only: bool = False, quantities: Iterable[str] = DEFAULT) -> None:
        self.subject = subject
        self.groups = [group(subject, patches_only) for group in choose(quantities)]
        self.layers: list[dict[str, RunningMean]] = [{} for _ in subject.layers]
        self.num_images = 0
        self.batch: list[dict[str, Tensor]] = []

    def update(self, images: Tensor) -> None:
        """Runs the model on images of shape (B, 3, H, W) and adds the quantities of each layer.

        Raises:
            NonFiniteError: If a block's output is not finite.
        """
        self.num_images += len(images)
        self.batch = [{} for _ in self.layers]
        grid = probe.patch_grid(self.subject.model, images)
        for group in self.groups:
            group.begin(images, grid)
        with torch.inference_mode(), probe.visiting(self.subject.model, self._visit, finite=self.subject.label):
            self.subject.model(images)

    def _visit(self, view: probe.LayerView) -> None:
        for group in self.groups:
            for name, values in group.measure(view).items():
                self.layers[view.index].setdefault(name, RunningMean()).update(values)
                if name not in group.profiles and (view.index, name) not in group.frequencies:
                    self.batch[view.index][name] = values

    def results(self) -> list[dict[str, Values]]:
        """For each layer, every quantity and parameter."""
        layers: list[dict[str, Values]] = [{} for _ in self.layers]
        for group in self.groups:
            finished = group.finish()
            for index, (layer, quantities) in enumerate(zip(layers, self.layers, strict=True)):
                for name in filter(group.quantities.__contains__, quantities):
                    running, frequencies = quantities[name], group.frequencies.get((index, name))
                    mean, std, is_profile = running.mean.cpu(), running.std.cpu(), name in group.profiles
                    layer[name] = Values(mean, std, running.count, frequencies, is_profile)
                layer |= finished[index]
        for values, layer in zip(layers, self.subject.layers, strict=True):
            values |= {name: Values(p.double().cpu()) for name, p in probe.layer_parameters(layer).items()}
        return layers

    def result(self) -> Result:
        """Everything that was measured, with the model and the number of images."""
        subject = self.subject
        return Result(
            subject.label,
            subject.name,
            subject.weights,
            sum(p.numel() for p in subject.model.parameters()),
            subject.input_size,
            [layer.name for layer in subject.layers],
            self.results(),
            self.num_images,
            {group.name: group.left_out for group in self.groups if group.left_out},
        )


def measure(
    subjects: Sequence[Subject],
    batches: Iterable[Sequence[Tensor]],
    patches_only: bool = False,
    quantities: Iterable[str] = DEFAULT,
) -> list[Result]:
    """One pass over the images, through all models; the first is compared with each of the others, image by image.

    Args:
        subjects: The models, each in the mode and on the device in which to measure it.
        batches: Each holds one input per model, images of shape (B, 3, H, W); empty if no group needs images.
        patches_only: Whether class, distillation and register tokens are left out of the feature quantities.
        quantities: Names of the groups to measure (``quantities.GROUPS``), or ``all``.
    """
    first, *others = [Measurement(subject, patches_only, quantities) for subject in subjects]
    pairs = [PairedDifferences() if len(other.layers) == len(first.layers) else None for other in others]
    for batch in batches:
        for measurement, images in zip((first, *others), batch, strict=True):
            measurement.update(images)
        for other, pair in zip(others, pairs, strict=True):
            if pair is not None:
                pair.update(other.batch, first.batch, len(batch[0]))
    results = [measurement.result() for measurement in others]
    for index, (result, pair) in enumerate(zip(results, pairs, strict=True)):
        if pair is not None and pair.count > 1:
            differences = pair.result(result.label, first.subject.label, result.layer_names)
            results[index] = replace(result, differences=differences)
    return [first.result(), *results]
