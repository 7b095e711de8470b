"""One image: a layer's attention over it, the high-pass part, and the change by AttnScale."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import probe
from .figures import DIVERGING, SEQUENTIAL, fold, panels
from .subject import Subject


@dataclass(frozen=True)
class TokenMap:
    """One layer's attention over one image, averaged over heads, times N: uniform attention is 1."""

    label: str
    block: str
    picture: Tensor  # (H, W, 3) in [0, 1], as the model sees it
    query: str  # the token whose attention it is
    attention: Tensor  # (rows, columns) of patches; before AttnScale
    high_pass: Tensor  # attention minus its DC part
    change: Tensor | None  # what AttnScale adds; None without it


def token_map(subject: Subject, image: Tensor, layer: int) -> TokenMap:
    """The attention of one layer over one image: of the class token, or the mean of the patches without a class token.

    Args:
        subject: The model.
        image: Shape (3, H, W), transformed, on the model's device.
        layer: Index of the block; negative counts from the last.

    Raises:
        ValueError: If there is no such layer, or its maps do not span the picture (windows).
    """
    depth = len(subject.layers)
    if not -depth <= layer < depth:
        raise ValueError(f"--layer {layer}: {subject.label} has blocks 0 to {depth - 1}")
    layer %= depth
    seen: list[tuple[probe.AttentionMaps, tuple[int, int] | None]] = []

    def visit(view: probe.LayerView) -> None:
        if view.index == layer:
            seen.append((view.attention_maps(), view.grid))

    with torch.inference_mode(), probe.visiting(subject.model, visit, finite=subject.label):
        subject.model(image[None])
    maps, grid = seen[0]
    rows_columns = grid or probe.patch_grid(subject.model, image[None])
    num_patches, n = math.prod(rows_columns), maps.mixed.shape[-1]
    if len(maps.mixed) != 1 or n < num_patches:
        raise ValueError(
            f"--image: the attention of {subject.label}, {subject.layers[layer].name}, covers windows of {n} tokens, "
            "so there is no map of it over the picture"
        )

    is_of_class = n > num_patches and probe.has_class_token(subject.model)

    def over_picture(attn: Tensor) -> Tensor:
        mean = attn[0].mean(dim=0)
        row = mean[0] if is_of_class else mean.mean(dim=0)
        return n * row[-num_patches:].reshape(rows_columns).cpu()

    has_attnscale = "lamb" in probe.layer_parameters(subject.layers[layer])
    return TokenMap(
        subject.label,
        subject.layers[layer].name,
        subject.as_picture(image),
        "class token" if is_of_class else "mean over all queries",
        over_picture(maps.mixed),
        over_picture(maps.mixed - 1 / n),
        over_picture(maps.applied - maps.mixed) if has_attnscale else None,
    )


def draw_token_maps(maps: Sequence[TokenMap]) -> Figure:
    """One row per model: the picture, the attention, its high-pass part, and the change by AttnScale."""
    figure, axes = panels(len(maps), 4, width=3.1, height=2.9)
    for row, item in zip(axes, maps, strict=True):
        height, width = item.picture.shape[:2]
        extent = (0, width, height, 0)
        grey = item.picture.mean(dim=-1)
        row[0].imshow(item.picture.numpy(), extent=extent)
        row[0].set_title(f"{fold(item.label, 2.8, 9)}\n{item.block}, {item.query}", fontsize=9)
        layers = (
            ("attention × N", item.attention),
            ("high-pass part × N", item.high_pass),
            ("AttnScale's change × N", item.change),
        )
        for ax, (title, values) in zip(row[1:], layers, strict=True):
            ax.set_title(title, fontsize=9)
            ax.imshow(grey.numpy(), extent=extent, cmap="gray", vmin=0, vmax=1)
            if values is None or not values.any():
                reason = "no AttnScale\nin this layer" if values is None else "no change:\nλ = 0"
                ax.text(
                    0.5,
                    0.5,
                    reason,
                    transform=ax.transAxes,
                    ha="center",
                    va="center",
                    bbox=dict(facecolor="white", edgecolor="none"),
                )
                continue
            signed, limit = values is not item.attention, values.abs().max().item()
            image = ax.imshow(
                values.numpy(),
                extent=extent,
                cmap=DIVERGING if signed else SEQUENTIAL,
                alpha=0.7,
                vmin=-limit if signed else None,
                vmax=limit if signed else None,
                interpolation="nearest",
            )
            figure.colorbar(image, ax=ax, shrink=0.8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def token_map_rows(maps: Sequence[TokenMap]) -> Iterable[dict[str, Any]]:
    """Every number in the figure of the token maps."""
    for item in maps:
        rows, columns = item.attention.shape
        for row in range(rows):
            for column in range(columns):
                yield {
                    "model": item.label,
                    "block": item.block,
                    "query": item.query,
                    "row": row,
                    "column": column,
                    "attention_times_n": f"{item.attention[row, column]:.8g}",
                    "high_pass_times_n": f"{item.high_pass[row, column]:.8g}",
                    "change_times_n": "" if item.change is None else f"{item.change[row, column]:.8g}",
                }
