"""Interventions: sets a remedy's parameter by hand, without training, and measures the model at every value."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from ..convert import add_remedy, describe, remove_remedy
from ..remedies import REMEDIES, LayerShape, RemedyError
from ..remedies.base import state_on_meta
from . import probe, spectrum
from .figures import COLOURS, LAYER_AXIS, SEQUENTIAL, Picture, fold, legend_below, line_style, panels
from .inputs import Models, by_label, inputs_and_labels, logits_of

VALUES = tuple(step / 4 for step in range(-4, 5))
QUANTITIES = {
    "accuracy": "top-1 accuracy (%)",
    "loss": "cross-entropy (nats)",
    "token_similarity": "token similarity before the last block",
}
Layers = str | Sequence[int]
ALL = -1  # in place of a layer's index: all layers at once


@dataclass(frozen=True)
class Sweep:
    """One model at every value of one parameter of a remedy."""

    label: str
    remedy: str
    parameter: str  # its name in the model, such as lamb
    blocks: list[str]  # names of all blocks
    layers: list[int]  # rows of the numbers: indices of blocks, or ALL
    values: list[float]  # columns of the numbers
    numbers: dict[str, Tensor]  # of QUANTITIES -> (rows, columns), float64: %, nats, cosine
    unchanged: dict[str, float]  # the same for the unchanged model
    count: int  # images

    def rows(self) -> Iterable[dict[str, Any]]:
        """Every number as a row of CSV; layer and value are empty for the unchanged model."""
        head = {"model": self.label, "remedy": self.remedy, "parameter": self.parameter}
        yield head | {"layer": "", "block": "", "value": ""} | _written(self.unchanged) | {"count": self.count}
        for row, layer in enumerate(self.layers):
            where = ("all", "") if layer == ALL else (layer, self.blocks[layer])
            for column, value in enumerate(self.values):
                numbers = {name: table[row, column].item() for name, table in self.numbers.items()}
                place = {"layer": where[0], "block": where[1], "value": f"{value:g}"}
                yield head | place | _written(numbers) | {"count": self.count}


def _written(numbers: dict[str, float]) -> dict[str, str]:
    return {name: f"{number:.6g}" for name, number in numbers.items()}


def sweep_parameter(
    models: Models,
    batches: Iterable[Any],
    remedy: str,
    *,
    parameter: str | None = None,
    values: Sequence[float] = VALUES,
    layers: Layers = "all",
) -> list[Sweep]:
    """Accuracy, loss and token similarity as functions of a remedy's parameter, which is set by hand.

    In a model that has the remedy, the value replaces the learnt parameter in the chosen layers; the other layers keep
    theirs. A plain model first gets the remedy by ``add_remedy``, at its start values, where it is the identity. Every
    model is restored exactly. One pass over the images, with ``rows * values + 1`` forward passes per batch, model and
    parameter; ``all`` makes one row, ``each`` one row per layer.

    Args:
        models: A model with a head, or several by their labels; each of a kind that ``add_remedy`` accepts.
        batches: Of (images, labels), see :func:`inputs.inputs_and_labels`; labels are indices of the head's outputs.
        remedy: A name of ``list_remedies()``.
        parameter: A parameter with one number per head or channel, such as ``lamb2``. None: each such parameter, one
            after the other.
        values: All entries of the parameter are set to each of these in turn.
        layers: ``all`` sets it in all layers at once, ``each`` in one layer after the other; or some layers by their
            indices, one after the other.

    Returns:
        One sweep per model and parameter.

    Raises:
        RemedyError: If the remedy or parameter is unknown or does not fit a model, or a model has other remedies.
        ValueError: If there are no labels or logits, a label has no output, or a layer lacks the parameter.
    """
    models = by_label(models)
    names = parameters_of(remedy)
    if parameter is not None and parameter not in names:
        raise RemedyError(f"{remedy} has no parameter {parameter!r} to sweep; there are {', '.join(names)}")
    names = [parameter] if parameter is not None else names
    columns = [float(value) for value in values]
    if not columns or not all(map(math.isfinite, columns)):
        raise ValueError(f"values={list(values)}: give one finite number or more")
    with ExitStack() as stack:
        stack.enter_context(probe.evaluating(*models.values()))
        for label, model in models.items():
            stack.enter_context(_with_remedy(model, remedy, label))
        running = [
            _Running(label, model, remedy, name, columns, layers) for label, model in models.items() for name in names
        ]
        for inputs, targets in inputs_and_labels(batches, list(models.values()), "a sweep"):
            given = dict(zip(models, inputs, strict=True))
            for one in running:
                one.update(given[one.label], targets)
        return [one.result() for one in running]


def parameters_of(remedy: str) -> list[str]:
    """Names of a remedy's parameters with one number per head or channel.

    Raises:
        RemedyError: If there is no such remedy, or it has none.
    """
    describe(remedy)  # refuses an unknown name
    state = state_on_meta(REMEDIES[remedy], LayerShape(0, dim=1, num_heads=1, head_dim=1))
    names = [name for name, value in state.items() if isinstance(value, Tensor) and value.dim() == 1]
    if not names:
        raise RemedyError(f"{remedy} has no parameter that is a number a head or channel, so there is nothing to sweep")
    return names


def check_remedy(models: Models, remedy: str) -> None:
    """Refuses the models and remedies that :func:`sweep_parameter` would refuse, without a pass; changes no model.

    Raises:
        RemedyError: If the remedy is unknown, does not fit a model, or a model has other remedies.
    """
    for label, model in by_label(models).items():
        with _with_remedy(model, remedy, label):
            pass


@contextmanager
def _with_remedy(model: nn.Module, remedy: str, label: str) -> Iterator[None]:
    """The model with the remedy; if it was added here, it is removed again."""
    names = parameters_of(remedy)
    if any(name.rpartition(".")[2] in names for name, _ in model.named_parameters()):
        yield
        return
    try:
        add_remedy(model, remedy)
    except RemedyError as error:
        raise RemedyError(f"{label} cannot be swept over {remedy}: {error}") from error
    try:
        yield
    finally:
        remove_remedy(model)


@contextmanager
def _filled(parameters: Sequence[Tensor], value: float) -> Iterator[None]:
    kept = [parameter.clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.fill_(value)
        yield
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.copy_(before)


class _Running:
    """Sums over the images so far, for one model and parameter."""

    def __init__(
        self, label: str, model: nn.Module, remedy: str, parameter: str, values: list[float], layers: Layers
    ) -> None:
        self.label, self.model, self.remedy, self.parameter, self.values = label, model, remedy, parameter, values
        found = probe.find_layers(model)
        self.blocks = [layer.name for layer in found]
        self.rows = _rows(label, model, [layer.block for layer in found], parameter, layers)
        self.count = 0
        self.sums: list[list[Tensor | float]] = []

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Measures the unchanged model, then every value in every row."""
        sums = [self._measure(images, labels)]
        for parameters in self.rows.values():
            for value in self.values:
                with _filled(parameters, value):
                    sums.append(self._measure(images, labels))
        self.count += len(images)
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums

    def _measure(self, images: Tensor, labels: Tensor) -> Tensor:
        """Sums over the batch of each of ``QUANTITIES``, (3,)."""
        similarity: list[Tensor] = []

        def visit(view: probe.LayerView) -> None:
            if view.index == max(0, len(self.blocks) - 2):
                similarity.append(spectrum.token_similarity(view.after_mlp))

        with probe.visiting(self.model, visit):
            logits = logits_of(self.model(images), self.label).float()
        labels = labels.to(logits.device)
        if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise ValueError(
                f"labels from {int(labels.min())} to {int(labels.max())}, but {self.label} has {logits.shape[1]} "
                "outputs: give the images of the classes that it was trained on"
            )
        right = (logits.argmax(dim=1) == labels).double().sum()
        loss = F.cross_entropy(logits, labels, reduction="sum").double()
        return torch.stack([100 * right, loss, similarity[0].double().sum()])

    def result(self) -> Sweep:
        means = torch.stack(self.sums).cpu() / self.count  # (1 + rows * values, 3)
        tables = means[1:].view(len(self.rows), len(self.values), len(QUANTITIES))
        return Sweep(
            self.label,
            self.remedy,
            self.parameter,
            self.blocks,
            list(self.rows),
            self.values,
            {name: tables[..., index] for index, name in enumerate(QUANTITIES)},
            {name: means[0, index].item() for index, name in enumerate(QUANTITIES)},
            self.count,
        )


def _rows(label: str, model: nn.Module, blocks: list[nn.Module], name: str, layers: Layers) -> dict[int, list[Tensor]]:
    """Layer index, or ``ALL`` -> the tensors that are set together there (ContraNorm has two per block)."""

    def named(module: nn.Module) -> list[Tensor]:
        return [p.detach() for full, p in module.named_parameters() if full.rpartition(".")[2] == name]

    if layers == "all":
        return {ALL: named(model)}
    each = {index: found for index, block in enumerate(blocks) if (found := named(block))}
    if layers == "each":
        return each
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r}: give all, each, or indices of layers")
    if missing := [layer for layer in layers if layer not in each]:
        raise ValueError(f"layer {missing[0]} of {label} has no {name}; layers {', '.join(map(str, each))} have")
    return {layer: each[layer] for layer in layers}


def sweep_picture(sweeps: Sequence[Sweep]) -> Picture:
    """The curves of one remedy."""
    first = sweeps[0]
    sentences = [_sentence(sweep) for sweep in sweeps]
    caption = (
        f"All entries of the parameter are set to the value, without training; {first.count} images, of which one is "
        f"{100 / first.count:.2g} points. Dashed: the model as it is. {' '.join(sentences)} The best value was picked "
        "on these images, so it flatters."
    )
    names = ", ".join(dict.fromkeys(sweep.parameter for sweep in sweeps))
    title = f"{first.remedy}: {names} set by hand"
    return Picture(f"sweep_{first.remedy}.png", title, caption, draw_sweeps(sweeps))


def _sentence(sweep: Sweep) -> str:
    table = sweep.numbers["accuracy"]
    row, column = divmod(int(table.argmax()), table.shape[1])
    if table[row, column] <= sweep.unchanged["accuracy"]:
        return f"{sweep.label}: {sweep.unchanged['accuracy']:.1f}% as it is, and nowhere more."
    where = "in all layers" if sweep.layers[row] == ALL else f"in layer {sweep.layers[row]}"
    return (
        f"{sweep.label}: {sweep.unchanged['accuracy']:.1f}% as it is, at best {table[row, column]:.1f}% "
        f"({sweep.parameter} = {sweep.values[column]:g} {where})."
    )


def draw_sweeps(sweeps: Sequence[Sweep]) -> Any:
    """One column per quantity. All layers at once: one row per parameter, a line per model. Else one row per sweep."""
    together = all(sweep.layers == [ALL] for sweep in sweeps)
    names = list(dict.fromkeys(sweep.parameter for sweep in sweeps))
    groups = [[s for s in sweeps if s.parameter == name] for name in names] if together else [[s] for s in sweeps]
    labels = list(dict.fromkeys(sweep.label for sweep in sweeps))
    figure, axes = panels(len(groups), len(QUANTITIES), width=4.0, height=3.2)
    deepest = max(max(sweep.layers) for sweep in sweeps)
    for row, group in zip(axes, groups, strict=True):
        for ax, (quantity, title) in zip(row, QUANTITIES.items(), strict=True):
            for sweep in group:
                _curves(ax, sweep, quantity, line_style(labels.index(sweep.label)), deepest)
            ax.axvline(0, color="0.6", linewidth=0.8)
            head = "all layers" if together else f"{group[0].label}, one layer at a time"
            ax.set_title(f"{fold(head, 3.7)}\n{title}", fontsize=10)
            ax.set_xlabel(f"{group[0].parameter} (dimensionless)")
            ax.set_ylabel(title.replace(" before the last block", ""))
            ax.grid(alpha=0.3)
    if together:
        legend_below(figure, [(label, line_style(index)) for index, label in enumerate(labels)])
    else:
        scale = ScalarMappable(Normalize(0, max(deepest, 1)), SEQUENTIAL)
        figure.colorbar(scale, ax=axes, label=LAYER_AXIS, ticks=MaxNLocator(integer=True))
    return figure


def _curves(ax: Any, sweep: Sweep, quantity: str, style: dict[str, Any], deepest: int) -> None:
    order = sorted(range(len(sweep.values)), key=sweep.values.__getitem__)
    x = [sweep.values[index] for index in order]
    for layer, numbers in zip(sweep.layers, sweep.numbers[quantity][:, order], strict=True):
        if layer == ALL:
            ax.plot(x, numbers, **style)
        else:
            ax.plot(x, numbers, color=colormaps[SEQUENTIAL](layer / max(deepest, 1)), linewidth=1.2, marker=".")
    colour = style["color"] if sweep.layers == [ALL] else COLOURS[1]
    ax.axhline(sweep.unchanged[quantity], color=colour, linewidth=0.9, linestyle="--")
