"""What attention does to a model's features, layer by layer: numbers, figures and a report.

    from oversmoothing.analysis import analyze
    analysis = analyze({"plain": model, "attnscale": other}, loader, "analysis")
    analysis.report  # path of a self-contained page; analysis.results holds every number in it

With several models, ``analysis.results[1].differences`` holds the differences of the second from the first, paired by
image. Further studies take the same models and batches, with labels if they need them::

    cka.compare_layers(models, loader)                        # similarity of layers
    linear_probe.probe_layers(models, loader)                 # class information by layer
    sweep.sweep_parameter(models, loader, "attnscale")        # a remedy's parameter set by hand

Figures, probes and intervals need ``pip install vit-anti-oversmoothing[analysis]``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from .inputs import by_label, images_of
from .measurement import measure
from .probe import UnsupportedModelError, evaluating, layer_report
from .quantities import DEFAULT, choose
from .results import Result
from .subject import subject_of

__all__ = ["Analysis", "UnsupportedModelError", "analyze", "layer_report"]


@dataclass(frozen=True)
class Analysis:
    """The numbers of an analysis, and the report's path."""

    results: list[Result]  # one per model
    report: Path  # report.html; analysis.csv, analysis.json and the figures lie beside it


def analyze(
    models: nn.Module | Mapping[str, nn.Module],
    batches: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]],
    output_dir: str | Path = "analysis",
    *,
    quantities: Iterable[str] = DEFAULT,
    patches_only: bool = False,
) -> Analysis:
    """Runs models over images, in one pass, and writes numbers, figures and a page.

    Models are measured in evaluation mode on their own device; afterwards their modes are restored.

    Args:
        models: A model, or several by their labels; each of a kind that ``probe.find_layers`` accepts.
        batches: A data loader: images of shape (B, 3, H, W), transformed, or tuples that begin with them. Memory grows
            with the batch, not with the number of batches. Not read if no group needs images (``eigenvalues``).
        output_dir: Folder for report.html, analysis.csv, analysis.json and the figures; made if needed.
        quantities: Names of the groups to measure (``quantities.GROUPS``), or ``all``.
        patches_only: Whether class, distillation and register tokens are left out of the feature quantities.

    Raises:
        TypeError: If the models are not given as one, or by their labels, or a batch has no tensor of images.
        UnsupportedModelError: If a model's attention cannot be recomputed.
        ValueError: If there are no batches, or a group is unknown.
    """
    from .report import write_analysis  # imports matplotlib, which measuring does not need

    groups = choose(quantities)
    models = by_label(models)
    needs_images = any(group.needs_images for group in groups)
    images = map(images_of, batches if needs_images else ())
    first = next(images, None)
    if first is None and needs_images:
        raise ValueError("no batches to analyse: give images, or a loader of a data set that is not empty")
    size = None if first is None else first.shape[-1]
    subjects = [subject_of(model, label, size) for label, model in models.items()]

    def inputs() -> Iterator[list[Tensor]]:
        for batch in chain([] if first is None else [first], images):
            yield [batch.to(next(subject.model.parameters()).device) for subject in subjects]

    with evaluating(*models.values()):
        results = measure(subjects, inputs(), patches_only, [group.name for group in groups])
    settings = {
        "images": results[0].num_images,
        "quantities": " ".join(group.name for group in groups),
        "tokens_in_feature_quantities": "patches" if patches_only else "all",
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    return Analysis(results, write_analysis(results, output_dir, settings))
