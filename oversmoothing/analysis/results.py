"""The numbers of an analysis: running means over the images, and the results as rows of CSV and as JSON."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..remedies import REMEDIES, LayerShape

# Quantity -> what it is, with its unit. The text of the report and of analysis.json.
QUANTITIES = {
    "spectrum": "spectral response of the attention map over the token axis, all N bins, DC included (gain)",
    "high_frequency_response": "mean of the spectral response over all frequencies but zero (gain)",
    "dc_gain": "DC to DC entry of the attention map (gain); 1 where rows sum to one",
    "attention_entropy": "mean entropy of the softmax rows (nats)",
    "head_similarity": "cosine similarity of the maps of different heads of a layer",
    "layer_similarity": "cosine similarity of the head-averaged map and that of the layer before",
    "hc_dc_attention": "||HC|| / ||DC|| of what the attention branch adds to the residual stream",
    "hc_dc_residual": "||HC|| / ||DC|| of the residual stream after the attention branch",
    "hc_dc_mlp": "||HC|| / ||DC|| of the block's output, after the MLP branch",
    "dc_energy": "||DC||^2 of the block's output (squared feature units)",
    "hc_energy": "||HC||^2 of the block's output (squared feature units)",
    "token_similarity": "signed cosine similarity of distinct tokens of the block's output",
    "token_similarity_published": "mean |cosine| over all pairs of tokens, diagonal included: the authors' form",
    "effective_rank": "effective rank of the block's output (directions)",
    "delta_log_amplitude": "log amplitude of the 2-D spectrum of the patch tokens, relative to zero frequency (nats)",
}


def quantities_of(results: Iterable["Result"]) -> dict[str, str]:
    """Every quantity of an analysis, what it is, with its unit; the remedies' parameters after all others."""
    names = dict.fromkeys(name for result in results for layer in result.layers for name in layer)
    return QUANTITIES | {name: describe_parameter(name) for name in names if name not in QUANTITIES}


def describe_parameter(name: str) -> str:
    """Of which remedy a parameter is, and what that computes."""
    own = name.rpartition(".")[2]
    shape = LayerShape(0, dim=1, num_heads=1, head_dim=1)
    remedy = next(remedy for remedy in REMEDIES.values() if own in remedy().new_state(shape))
    return f"parameter of {remedy.name}, by head or channel (dimensionless): {remedy.formula}"


class RunningMean:
    """Mean and standard deviation over the images seen so far; its size does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._sum_of_squares: Tensor | float = 0.0

    def update(self, values: Tensor) -> None:
        """Adds values of shape (B, ...), one per image. They stay on their device: no synchronisation."""
        values = values.detach().double()
        self.count += len(values)
        self._sum = self._sum + values.sum(dim=0)
        self._sum_of_squares = self._sum_of_squares + values.square().sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """Shape (...), float64."""
        return self._sum / self.count

    @property
    def std(self) -> Tensor:
        """Shape (...), float64, of the population: over the images, not an error of the mean."""
        return (self._sum_of_squares / self.count - self.mean.square()).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Values:
    """A quantity in one layer: mean and standard deviation over ``count`` images (Swin's maps: windows)."""

    mean: Tensor  # (), (num_heads,), (bins,), (channels,) or (num_heads, bins)
    std: Tensor | None = None  # parameters have none
    count: int | None = None
    frequencies: list[float] | None = None  # of the bins, in units of pi rad per token or patch


@dataclass(frozen=True)
class Result:
    """What was measured on one model."""

    label: str
    name: str
    weights: str
    num_parameters: int
    input_size: int
    layer_names: list[str]
    layers: list[dict[str, Values]]

    @property
    def num_images(self) -> int:
        """How many images it was measured on."""
        return self.layers[0]["hc_dc_mlp"].count

    def scalars(self, quantity: str) -> tuple[list[int], Tensor, Tensor]:
        """Layers that have the quantity, its mean there, and its std over the images, all averaged over heads."""
        found = [(index, layer[quantity]) for index, layer in enumerate(self.layers) if quantity in layer]
        mean = torch.stack([values.mean.mean() for _, values in found]) if found else torch.empty(0)
        std = torch.stack([values.std.mean() for _, values in found]) if found else torch.empty(0)
        return [index for index, _ in found], mean, std


def tidy_rows(results: Iterable[Result]) -> Iterable[dict[str, Any]]:
    """Every number as one row: model, layer, quantity, unit (head or channel), frequency, mean, std, count."""
    for result in results:
        for index, layer in enumerate(result.layers):
            for quantity, values in layer.items():
                head = {"model": result.label, "layer": index, "block": result.layer_names[index], "quantity": quantity}
                yield from (head | row for row in _entries(values))


def _entries(values: Values) -> Iterable[dict[str, Any]]:
    has_bins = values.frequencies is not None
    for position, mean in enumerate(values.mean.flatten().tolist()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), values.mean.shape))
        unit = index[:-1] if has_bins else index
        yield {
            "unit": unit[0] if unit else "",
            "frequency_pi": f"{values.frequencies[index[-1]]:.6g}" if has_bins else "",
            "mean": f"{mean:.8g}",
            "std": "" if values.std is None else f"{values.std.flatten()[position].item():.8g}",
            "count": values.count or "",
        }


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows that share their keys, the first one's as the header."""
    rows = iter(rows)
    first = next(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(first))
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(rows)


def json_ready(value: Any) -> Any:
    """Tensors as lists; what JSON has no number for (inf, nan) as null."""
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
                }
                for result in results
            ],
        }
    )
