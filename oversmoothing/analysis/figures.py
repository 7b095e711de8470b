"""The figures of an analysis, in the paper's form where the paper has one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure  # without pyplot: no display and no global state
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from .results import QUANTITIES, Result, quantities_of

# Okabe and Ito's palette without its yellow, which is too pale for lines: told apart by all kinds of colour vision.
# Markers and line styles repeat the distinction for grey-scale prints.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SEQUENTIAL, DIVERGING = "cividis", "PuOr_r"
LAYER_AXIS = "layer (block index)"
MOST_HEADS = 32  # a vector of up to so many numbers is drawn number by number

_BANDS = (
    "Lines: means over the images; bands: ± one standard deviation over the images, on logarithmic axes the factor "
    "1 + std/mean up and down."
)
# Figure -> its title and caption in the report.
CAPTIONS = {
    "overview": (
        "Over-smoothing at a glance",
        f"Of each block's output. Left: towards 1 all tokens are alike. Right: towards 0 they become one. {_BANDS}",
    ),
    "hc_dc": (
        "High-frequency against DC",
        "‖HC‖/‖DC‖ of the token sequence, logarithmic. Towards 0 the tokens become one. The first panel shows what the "
        f"attention branch adds, after FeatScale and LayerScale where the model has them. {_BANDS}",
    ),
    "similarity": (
        "Similarity by depth",
        "Towards 1 the tokens, or maps, are alike. The authors' form drops the sign and counts each token with itself, "
        "so it cannot come near 0. Softmax maps are non-negative, so their similarity is high anyway; CaiT's mixed "
        f"maps are signed. {_BANDS}",
    ),
    "attention": (
        "Attention and rank by depth",
        "The DC gain is 1 wherever the rows of a map sum to one; CaiT mixes heads after the softmax, so its need not. "
        f"The entropy is that of the softmax itself and at most the logarithm of the number of tokens. {_BANDS}",
    ),
    "heads": (
        "High-frequency response by layer and head",
        "Mean of the spectral response over all frequencies but zero, for each head, on one colour scale.",
    ),
    "log_amplitude": (
        "Fourier spectrum of the patch tokens",
        "Log amplitude on the diagonal of the 2-D spectrum over the image grid, minus that at zero frequency, averaged "
        "over channels and images. Lower at the right: smoother over the picture.",
    ),
    "parameters": (
        "λ by layer",
        "Lines: means over heads or channels. AttnScale: each head is a point. FeatScale: the band spans the 10th to "
        "90th percentile of the channels. At λ = 0 a remedy is absent.",
    ),
    "spectrum": (
        "Spectral response",
        "One panel a layer, logarithmic. The peak at zero frequency is DC; a low-pass map is low everywhere else. Each "
        "response is the mean over the images.",
    ),
}


@dataclass(frozen=True)
class Picture:
    """A figure in the report."""

    file: str
    title: str
    caption: str
    figure: Figure


def draw_all(results: Sequence[Result]) -> list[Picture]:
    """Every figure of the report that has something to show."""
    figures = {
        "overview": draw_overview(results),
        "hc_dc": draw_ratios(results),
        "similarity": draw_similarity(results),
        "attention": draw_attention(results),
        "heads": draw_heads(results),
        "log_amplitude": draw_log_amplitude(results),
        "parameters": draw_parameters(results),
    }
    pictures = [Picture(f"{name}.png", *CAPTIONS[name], figure) for name, figure in figures.items() if figure]
    title, caption = CAPTIONS["spectrum"]
    for index, result in enumerate(results):
        pictures.append(Picture(f"spectrum_{index}.png", f"{title}: {result.label}", caption, draw_spectra(result)))
    return pictures


def draw_overview(results: Sequence[Result]) -> Figure:
    """The two curves that over-smoothing is judged by: similarity of the tokens and HC/DC, of each block's output."""
    figure, axes = panels(1, 2, width=4.5, height=3.4)
    left, right = axes.flat
    _by_layer(left, results, "token_similarity", "how alike the tokens are", "cosine similarity of distinct tokens")
    _up_to_one(left)
    _by_layer(right, results, "hc_dc_mlp", "how much the tokens differ from their mean", "‖HC‖ / ‖DC‖", log=True)
    _shared_legend(figure, results, title="block outputs; lines: mean over the images, bands: one standard deviation")
    return figure


def draw_ratios(results: Sequence[Result]) -> Figure:
    """HC/DC after the attention branch, after the residual sum and after the MLP."""
    figure, axes = panels(1, 3, sharey=True)
    titles = {
        "hc_dc_attention": "after attention (branch)",
        "hc_dc_residual": "after the residual sum",
        "hc_dc_mlp": "after the MLP (block output)",
    }
    for ax, (quantity, title) in zip(axes.flat, titles.items(), strict=True):
        _by_layer(ax, results, quantity, title, "‖HC‖ / ‖DC‖", log=True)
        ax.tick_params(labelleft=True)
    _shared_legend(figure, results)
    return figure


def draw_similarity(results: Sequence[Result]) -> Figure:
    """Similarity of tokens and of attention maps by depth."""
    figure, axes = panels(2, 2)
    titles = {
        "token_similarity": "tokens: signed, distinct pairs",
        "token_similarity_published": "tokens: |cos|, all pairs (authors' form)",
        "head_similarity": "maps: heads of a layer",
        "layer_similarity": "maps: a layer and the one before",
    }
    for ax, (quantity, title) in zip(axes.flat, titles.items(), strict=True):
        if _by_layer(ax, results, quantity, title, "cosine similarity") and quantity.startswith("token"):
            _up_to_one(ax)  # maps all lie near 1, so their panels are cut to the data
    _shared_legend(figure, results)
    return figure


def draw_attention(results: Sequence[Result]) -> Figure:
    """Attention maps by depth in single numbers: high-frequency response, DC gain, entropy; and the features' rank."""
    figure, axes = panels(2, 2)
    gain = "gain (mean of heads)"
    _by_layer(axes[0, 0], results, "high_frequency_response", "response over frequencies ≠ 0", gain, log=True)
    _by_layer(axes[0, 1], results, "dc_gain", "response from DC to DC", gain)
    _by_layer(axes[1, 0], results, "attention_entropy", "entropy of the softmax rows", "nats (mean of heads)")
    _by_layer(axes[1, 1], results, "effective_rank", "effective rank of the features", "directions")
    axes[0, 1].ticklabel_format(useOffset=False)
    low, high = axes[0, 1].get_ylim()
    if high - low < 0.02:  # rows that sum to one: do not blow rounding up to a figure
        axes[0, 1].set_ylim(0.9, 1.1)
    _shared_legend(figure, results)
    return figure


def draw_heads(results: Sequence[Result]) -> Figure:
    """The high-frequency response of every head, as a map over layers and heads."""
    figure, axes = panels(1, len(results), width=3.6, height=4.0)
    tables = []
    for result in results:
        rows = [layer["high_frequency_response"].mean for layer in result.layers]
        table = torch.full((len(rows), max(len(row) for row in rows)), math.nan)
        for index, row in enumerate(rows):
            table[index, : len(row)] = row
        tables.append(table)
    finite = torch.cat([table[table.isfinite()] for table in tables])
    scale = LogNorm(finite[finite > 0].min().item(), finite.max().item())
    for ax, result, table in zip(axes.flat, results, tables, strict=True):
        ax.imshow(table.numpy(), aspect="auto", origin="lower", cmap=SEQUENTIAL, norm=scale, interpolation="nearest")
        ax.set_title(result.label, fontsize=10, wrap=True)
        ax.set_xlabel("head")
        ax.set_ylabel(LAYER_AXIS)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    figure.colorbar(ScalarMappable(scale, SEQUENTIAL), ax=axes, label="mean response over frequencies ≠ 0 (gain)")
    return figure


def draw_spectra(result: Result) -> Figure:
    """The spectral response of every layer of a model, one panel a layer, one line a head."""
    depth = len(result.layers)
    columns = 6 if depth > 12 else 4
    columns = min(columns, depth)
    rows = math.ceil(depth / columns)
    figure, axes = panels(rows, columns, width=2.5, height=2.0, sharex=True, sharey=True)
    for index, ax in enumerate(axes.flat):
        if index >= depth:
            ax.set_visible(False)
            continue
        heads, bins = result.layers[index]["spectrum"].mean, result.layers[index]["spectrum"].frequencies
        for head, response in enumerate(heads):
            ax.plot(bins, response, color=COLOURS[5], linewidth=0.7, alpha=0.8, label="one head" if head == 0 else None)
        ax.plot(bins, heads.mean(dim=0), color=COLOURS[1], linewidth=1.4, label="mean of the heads")
        ax.set_yscale("log")
        ax.set_title(result.layer_names[index], fontsize=8)
        ax.set_xticks([-1, 0, 1], ["-π", "0", "π"])
        ax.grid(alpha=0.3)
        if index + columns >= depth:  # panels with none below them
            ax.tick_params(labelbottom=True)
    figure.supxlabel("frequency along the token axis (rad per token)", fontsize=10)
    figure.supylabel("spectral response (gain)", fontsize=10)
    figure.suptitle(result.label, fontsize=11)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def draw_log_amplitude(results: Sequence[Result]) -> Figure | None:
    """Relative log amplitude of the patch tokens' 2-D spectrum, one panel a model, one line a layer."""
    drawable = [result for result in results if any("delta_log_amplitude" in layer for layer in result.layers)]
    if not drawable:
        return None
    figure, axes = panels(1, len(drawable), width=3.6, sharey=True)
    deepest = max(len(result.layers) for result in drawable) - 1
    colours = colormaps[SEQUENTIAL]
    for ax, result in zip(axes.flat, drawable, strict=True):
        for index, layer in enumerate(result.layers):
            if "delta_log_amplitude" in layer:
                values = layer["delta_log_amplitude"]
                ax.plot(values.frequencies, values.mean, color=colours(index / max(deepest, 1)), linewidth=1.2)
        ax.set_title(result.label, fontsize=10, wrap=True)
        ax.set_xlabel("frequency (π rad per patch)")
        ax.set_ylabel("Δ log amplitude (nats)")
        ax.tick_params(labelleft=True)
        ax.grid(alpha=0.3)
    scale = ScalarMappable(Normalize(0, max(deepest, 1)), SEQUENTIAL)
    figure.colorbar(scale, ax=axes, label=LAYER_AXIS, ticks=MaxNLocator(integer=True))
    return figure


def draw_parameters(results: Sequence[Result]) -> Figure | None:
    """The remedies' parameters by layer: every head of those with one a head, else the spread over channels."""
    titles = {"lamb": "AttnScale: λ of each head", "lamb1": "FeatScale: λ₁ (DC)", "lamb2": "FeatScale: λ₂ (high-pass)"}
    present = [name for name in quantities_of(results) if name not in QUANTITIES]
    if not present:
        return None
    figure, axes = panels(1, len(present))
    for ax, name in zip(axes.flat, present, strict=True):
        for index, result in enumerate(results):
            found = [(i, layer[name].mean) for i, layer in enumerate(result.layers) if name in layer]
            if not found:
                continue
            layers, values = [i for i, _ in found], [value for _, value in found]
            centre = torch.stack([value.mean() for value in values])
            ax.plot(layers, centre, label=result.label, **line_style(index))
            colour = COLOURS[index % len(COLOURS)]
            if max(map(len, values)) <= MOST_HEADS:
                for layer, heads in zip(layers, values, strict=True):
                    ax.scatter([layer] * len(heads), heads, s=9, color=colour, alpha=0.5, linewidths=0)
            else:
                low, high = (torch.stack([value.quantile(q) for value in values]) for q in (0.1, 0.9))
                ax.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set_title(titles.get(name, name), fontsize=10)
        ax.set_ylabel("value (dimensionless)")
        _layer_axis(ax, max(len(result.layers) for result in results))
    _shared_legend(figure, results, present)
    return figure


def _by_layer(ax: Axes, results: Sequence[Result], quantity: str, title: str, ylabel: str, log: bool = False) -> bool:
    """One line a model with a band of one standard deviation over the images; whether any model has the quantity."""
    drawn = False
    for index, result in enumerate(results):
        layers, mean, std = result.scalars(quantity)
        if layers:
            style = line_style(index)
            ax.plot(layers, mean, label=result.label, **style)
            # On a logarithmic axis the same band as a factor: mean - std may be negative and has no place there.
            low, high = (mean / (1 + std / mean), mean + std) if log else (mean - std, mean + std)
            ax.fill_between(layers, low, high, color=style["color"], alpha=0.15, linewidth=0)
            drawn = True
    ax.set_title(title, fontsize=10)
    ax.set_ylabel(ylabel)
    if log:
        logarithmic(ax)
    _layer_axis(ax, max(len(result.layers) for result in results))
    if not drawn:
        ax.text(0.5, 0.5, "not defined for these models", transform=ax.transAxes, ha="center", color="0.4")
    return drawn


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line with this number; 28 of them differ."""
    # Gaps in the lines drawn last show those below: a remedy at lambda = 0 lies exactly on its plain model.
    line = ("-", "--", ":", "-.")[index % 4]
    return dict(
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=line,
        markersize=4,
        linewidth=1.5,
    )


def _up_to_one(ax: Axes) -> None:
    """Shows a similarity from 0 to 1, or, where it stays small, to what there is."""
    low, high = ax.get_ylim()
    ax.set_ylim(min(0, low), 1.02 if high > 0.4 else high)


def logarithmic(ax: Axes) -> None:
    """Ticks that read 0.2, 0.3, 0.4 on a narrow range, 0.2, 0.5, 1 on a wider one, powers of ten on a very wide one."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _layer_axis(ax: Axes, depth: int) -> None:
    ax.set_xlabel(LAYER_AXIS)
    ax.set_xlim(-0.6, depth - 0.4)  # no tick for a layer that is not there
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ax.grid(alpha=0.3)


def _shared_legend(
    figure: Figure, results: Sequence[Result], quantities: Sequence[str] = (), title: str | None = None
) -> None:
    handles = [
        Line2D([], [], label=result.label, **line_style(index))
        for index, result in enumerate(results)
        if not quantities or any(name in layer for name in quantities for layer in result.layers)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, title=title)


def panels(rows: int, columns: int, width: float = 4.0, height: float = 3.1, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure with a grid of panels, each ``width`` x ``height`` inches; its axes as an array (rows, columns)."""
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)
