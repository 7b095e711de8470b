"""One image, layer by layer: a group's quantity over the grid of patches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from . import probe
from .figures import SEQUENTIAL, fold, panel_title, panels
from .quantities import GROUPS
from .subject import Subject

MOST_LAYERS = 12  # in one figure


@dataclass(frozen=True)
class LayerMaps:
    """The maps of one model for one image."""

    label: str
    picture: Tensor  # (H, W, 3) in [0, 1], as the model sees it
    maps: dict[str, Tensor]  # block -> (rows, columns); blocks without a map are absent


def layer_maps(subject: Subject, image: Tensor, group: str) -> LayerMaps:
    """The maps of a group that has ``image_map``, in one forward pass of one image.

    Args:
        subject: The model.
        image: Shape (3, H, W), transformed, on the model's device.
        group: Name of the group.
    """
    instrument = GROUPS[group](subject)
    instrument.begin(image[None], probe.patch_grid(subject.model, image[None]))
    found: dict[str, Tensor] = {}

    def visit(view: probe.LayerView) -> None:
        values = instrument.over_image(view)
        if values is not None:
            found[view.layer.name] = values.float().cpu()

    with torch.inference_mode(), probe.visiting(subject.model, visit, finite=subject.label):
        subject.model(image[None])
    return LayerMaps(subject.label, subject.as_picture(image), found)


def draw_layer_maps(items: Sequence[LayerMaps], label: str) -> Figure:
    """For each model, the picture and up to 12 layers, evenly spaced from first to last, on one colour scale.

    Args:
        items: The maps of each model; models without any map are left out.
        label: What the colours mean.
    """
    items = [item for item in items if item.maps]
    chosen = [_spaced(list(item.maps)) for item in items]
    columns = min(7, 1 + max(map(len, chosen)))
    rows = [-(-len(blocks) // (columns - 1)) for blocks in chosen]
    figure, axes = panels(sum(rows), columns, width=1.6, height=1.75)
    for ax in axes.flat:
        ax.axis("off")
    top = 0
    for item, blocks, count in zip(items, chosen, rows, strict=True):
        axes[top, 0].imshow(item.picture.numpy())
        panel_title(axes[top, 0], item.label, fontsize=9, inches=1.3)
        more_lines = axes[top, 0].get_title().count("\n")
        figure.set_figheight(figure.get_figheight() + more_lines * 0.15)
        values = [item.maps[block] for block in blocks]
        scale = Normalize(min(v.min().item() for v in values), max(v.max().item() for v in values))
        for index, (block, value) in enumerate(zip(blocks, values, strict=True)):
            ax = axes[top + index // (columns - 1), 1 + index % (columns - 1)]
            ax.imshow(value.numpy(), cmap=SEQUENTIAL, norm=scale, interpolation="nearest")
            panel_title(ax, block, fontsize=8, inches=1.3)
        bar = figure.colorbar(ScalarMappable(scale, SEQUENTIAL), ax=axes[top : top + count], shrink=0.9)
        bar.set_label(fold(label, 1.4 * count, fontsize=8), fontsize=8)
        top += count
    return figure


def _spaced(blocks: list[str]) -> list[str]:
    if len(blocks) <= MOST_LAYERS:
        return blocks
    return [blocks[round(index * (len(blocks) - 1) / (MOST_LAYERS - 1))] for index in range(MOST_LAYERS)]


def layer_map_rows(items: Sequence[LayerMaps], group: str) -> Iterable[dict[str, Any]]:
    """Every number of the maps, also of layers that are not in the figure."""
    for item in items:
        for block, values in item.maps.items():
            for row, numbers in enumerate(values.tolist()):
                for column, value in enumerate(numbers):
                    head = {"model": item.label, "block": block, "row": row, "column": column}
                    yield head | {group: f"{value:.8g}"}
