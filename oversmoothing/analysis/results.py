"""The numbers of an analysis: running means over the images, and the results as rows of CSV and as JSON."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..remedies import REMEDIES, LayerShape
from .paired import Differences
from .quantities import QUANTITIES
from .values import Values


def quantities_of(results: Iterable["Result"]) -> dict[str, str]:
    """Every quantity of an analysis -> its description with its unit; the remedies' parameters come last."""
    results = list(results)
    measured = {name for result in results for layer in result.layers for name in layer}
    return {name: text for name, text in QUANTITIES.items() if name in measured} | parameters_of(results)


def parameters_of(results: Iterable["Result"]) -> dict[str, str]:
    """The remedies' parameters among the quantities of an analysis -> their descriptions."""
    names = dict.fromkeys(name for result in results for layer in result.layers for name in layer)
    return {name: describe_parameter(name) for name in names if name not in QUANTITIES}


def describe_parameter(name: str) -> str:
    """The remedy that a parameter belongs to, and the remedy's formula."""
    own = name.rpartition(".")[2]
    shape = LayerShape(0, dim=1, num_heads=1, head_dim=1)
    remedy = next(remedy for remedy in REMEDIES.values() if own in remedy().new_state(shape))
    return f"parameter of {remedy.name}, by head or channel (dimensionless): {remedy.formula}"


@dataclass(frozen=True)
class Result:
    """The measurements of one model."""

    label: str
    name: str
    weights: str
    num_parameters: int
    input_size: int
    layer_names: list[str]
    layers: list[dict[str, Values]]
    num_images: int = 0
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)  # group -> block -> why it has no numbers there
    differences: Differences | None = None  # to the first model, image by image; None where the depths differ

    def scalars(self, quantity: str) -> tuple[list[int], Tensor, Tensor]:
        """The layers that have the quantity, its means and its stds over the images, averaged over heads."""
        found = [(index, layer[quantity]) for index, layer in enumerate(self.layers) if quantity in layer]
        mean = torch.stack([values.mean.mean() for _, values in found]) if found else torch.empty(0)
        std = [torch.zeros(()) if values.std is None else values.std.mean() for _, values in found]
        std = torch.stack(std) if found else torch.empty(0)
        return [index for index, _ in found], mean, std


def tidy_rows(results: Iterable[Result]) -> Iterable[dict[str, Any]]:
    """Every number as one row: model, layer, quantity, unit (head or channel), frequency or index, mean, std, count."""
    for result in results:
        for index, layer in enumerate(result.layers):
            for quantity, values in layer.items():
                head = {"model": result.label, "layer": index, "block": result.layer_names[index], "quantity": quantity}
                yield from (head | row for row in _entries(values))


def _entries(values: Values) -> Iterable[dict[str, Any]]:
    has_bins = values.frequencies is not None
    has_axis = has_bins or values.is_profile
    for position, mean in enumerate(values.mean.flatten().tolist()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), values.mean.shape))
        unit = index[:-1] if has_axis else index
        yield {
            "unit": unit[0] if unit else "",
            "frequency_pi": f"{values.frequencies[index[-1]]:.6g}" if has_bins else "",
            "index": index[-1] if values.is_profile else "",
            "mean": f"{mean:.8g}",
            "std": "" if values.std is None else f"{values.std.flatten()[position].item():.8g}",
            "count": values.count or "",
        }


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows that share their keys, the first one's as the header; of no rows an empty file."""
    rows = iter(rows)
    first = next(rows, {})
    with path.open("w", newline="", encoding="utf-8") as file:
        if first:
            writer = csv.DictWriter(file, list(first))
            writer.writeheader()
            writer.writerow(first)
            writer.writerows(rows)


def json_ready(value: Any) -> Any:
    """Tensors as lists, and numbers that JSON does not have (inf, nan) as null."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(results: Iterable[Result], settings: dict[str, Any]) -> dict[str, Any]:
    """The content of analysis.json."""
    return json_ready(
        {
            "settings": settings,
            "quantities": quantities_of(results),
            "models": [
                {
                    "label": result.label,
                    "name": result.name,
                    "weights": result.weights,
                    "num_parameters": result.num_parameters,
                    "input_size": result.input_size,
                    "left_out": result.left_out,
                    "layers": [
                        {"block": name}
                        | {
                            quantity: {"mean": values.mean}
                            | ({} if values.std is None else {"std": values.std, "count": values.count})
                            | ({} if values.frequencies is None else {"frequency_pi": values.frequencies})
                            for quantity, values in layer.items()
                        }
                        for name, layer in zip(result.layer_names, result.layers, strict=True)
                    ],
                    "differences": result.differences and list(result.differences.rows()),
                }
                for result in results
            ],
        }
    )
