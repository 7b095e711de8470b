"""The figures of a comparison: differences, curves and depth, each with its 95% interval over the seeds."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from oversmoothing.analysis.figures import Picture, layer_axis, line_style, panels
from scripts.comparison.results import BEFORE_LAST, HEADLINE, QUANTITIES, Results
from scripts.comparison.statistics import Difference, differences, summarise

MANY_ARMS = 4  # more bands than these hide each other
PANELS_A_ROW = 4
BY_LAYER = {
    "token_similarity": ("token similarity of the block's output", "cosine of distinct tokens"),
    "hc_dc_mlp": ("‖HC‖/‖DC‖ of the block's output", "ratio"),
    "hc_dc_attention": ("‖HC‖/‖DC‖ of what attention adds", "ratio"),
    "effective_rank": ("effective rank of the block's output", "directions"),
}
OF_FEATURES = (*BY_LAYER, "hc_dc_residual")  # what layers.csv has besides the remedies' parameters


def draw_all(results: Results, arms: Sequence[str], settings: Sequence[str], baseline: str) -> list[Picture]:
    """Every figure that has something to show.

    Args:
        results: Results of the study.
        arms: In the order of the study.
        settings: Also in the order of the study.
        baseline: One of the arms.
    """
    pictures, bands = [], explain_bands(arms)
    if figure := draw_differences(results, arms, settings, baseline):
        caption = (
            f"{QUANTITIES[HEADLINE].label}: each arm minus {baseline}, paired by seed. Dots: seeds; squares and bars: "
            "mean and its 95% interval, not corrected for the number of arms (the p-values of the table are)."
        )
        pictures.append(Picture("differences.png", "Differences to the baseline", caption, figure))
    if len(settings) > 1:
        figure = draw_settings(results, arms, settings)
        caption = (
            "Means with 95% intervals, cut at the edge, and single seeds, at the last epoch (similarity: the last one "
            "with a spectrum)."
        )
        pictures.append(Picture("settings.png", "Accuracy and token similarity by setting", caption, figure))
    pictures.append(Picture("curves.png", "Curves by epoch", bands, draw_curves(results, arms, settings)))
    if figure := draw_depth(results, arms, settings):
        caption = (
            "At the last epoch with a spectrum. Towards a similarity of 1, a ratio of 0 or an effective rank of 1, "
            f"tokens are one. {bands}"
        )
        pictures.append(Picture("depth.png", "Over-smoothing by depth", caption, figure))
    if figure := draw_parameters(results, arms, settings):
        start = "A remedy that starts as the identity has summands at 0 and factors at 1."
        caption = f"Means over heads or channels. {start} {bands}"
        pictures.append(Picture("parameters.png", "Learnt λ by layer", caption, figure))
    return pictures


def explain_bands(arms: Sequence[str]) -> str:
    """What lines and bands are."""
    if len(arms) > MANY_ARMS:
        return "Lines: means over the seeds; intervals of so many arms hide each other (the CSV files have every seed)."
    return "Lines: means over the seeds; bands: 95% intervals of the mean (Student's t); none where there is one seed."


def draw_differences(results: Results, arms: Sequence[str], settings: Sequence[str], baseline: str) -> Figure | None:
    """Each arm's paired difference to the baseline, with its interval and its seeds; one panel a setting."""
    values = {setting: results.by_arm(HEADLINE, setting) for setting in settings}
    values = {setting: found for setting, found in values.items() if baseline in found and len(found) > 1}
    if not values:
        return None
    columns = min(3, len(values))
    rows = -(-len(values) // columns)
    others = [arm for arm in arms if arm != baseline]
    figure, axes = panels(rows, columns, width=4.6, height=1.2 + 0.35 * len(others), sharey=True)
    for ax, setting in zip(axes.flat, values, strict=False):
        found = differences(values[setting], baseline)
        for row, arm in enumerate(others):
            if arm in found:
                _difference(ax, row, found[arm], values[setting][arm], values[setting][baseline], arms.index(arm))
        ax.axvline(0, color="0.4", linewidth=0.8)
        ax.set_yticks(range(len(others)), others)
        ax.set_ylim(len(others) - 0.5, -0.5)
        ax.set_xlabel(f"difference to {baseline} (points)")
        ax.set_title(setting, fontsize=10)
        ax.grid(alpha=0.3, axis="x")
    for ax in axes.flat[len(values) :]:
        ax.set_visible(False)
    return figure


def _difference(
    ax: Axes, row: int, found: Difference, ours: dict[int, float], theirs: dict[int, float], index: int
) -> None:
    colour = line_style(index)["color"]
    single = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    ax.scatter(single, [row] * len(single), s=14, color=colour, alpha=0.5, linewidths=0)
    ax.plot([found.paired.low, found.paired.high], [row, row], color=colour, linewidth=2)
    ax.plot(found.paired.mean, row, marker="s", color=colour, markeredgecolor="black", markersize=6)


def draw_settings(results: Results, arms: Sequence[str], settings: Sequence[str]) -> Figure:
    """Accuracy, and token similarity where it was logged, by setting; one line an arm."""
    labels = {HEADLINE: "top-1 accuracy (%)", "token_similarity": f"token similarity\n{BEFORE_LAST} (cosine)"}
    labels = {name: label for name, label in labels.items() if name in results.last().columns}
    figure, axes = panels(1, len(labels), width=max(4.6, 1.1 * len(settings)), height=3.6)
    for ax, (quantity, label) in zip(axes.flat, labels.items(), strict=True):
        single = []
        for index, arm in enumerate(arms):
            values = {at: results.by_arm(quantity, setting).get(arm) for at, setting in enumerate(settings)}
            values = {at + 0.06 * (index - len(arms) / 2): list(v.values()) for at, v in values.items() if v}
            if values:
                found = [summarise(numbers) for numbers in values.values()]
                bars = [[s.mean - s.low for s in found], [s.high - s.mean for s in found]]
                ax.errorbar(list(values), [s.mean for s in found], bars, label=arm, capsize=2, **line_style(index))
            for at, numbers in values.items():
                ax.scatter(
                    [at] * len(numbers), numbers, s=14, color=line_style(index)["color"], alpha=0.5, linewidths=0
                )
                single += numbers
        if single:  # the bars of two seeds would leave nothing to see
            room = 0.1 * (max(single) - min(single)) or 1
            ax.set_ylim(min(single) - room, max(single) + room)
        ax.set_xticks(range(len(settings)), settings, rotation=20 if len(settings) > 4 else 0)
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return figure


def draw_curves(results: Results, arms: Sequence[str], settings: Sequence[str]) -> Figure:
    """Accuracy and losses by epoch; one row a setting."""
    names = {"test_acc1": "top-1 accuracy (%)", "test_loss": "test loss (nats)", "train_loss": "training loss (nats)"}
    figure, axes = panels(len(settings), len(names))
    for row, setting in zip(axes, settings, strict=True):
        table = results.epochs[results.epochs["setting"] == setting]
        for ax, (name, label) in zip(row, names.items(), strict=True):
            for index, arm in enumerate(arms):
                _band(ax, table[table["arm"] == arm], "epoch", name, index, len(arms) <= MANY_ARMS)
            low, high = ax.get_ylim()  # Student's intervals do not know what values there can be
            ax.set_ylim(max(low, 0), min(high, 100) if name == "test_acc1" else high)
            ax.set_xlabel("epoch")
            ax.set_ylabel(label)
            ax.set_title(setting, fontsize=10)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(alpha=0.3)
    _legend(figure, arms)
    return figure


def draw_depth(results: Results, arms: Sequence[str], settings: Sequence[str]) -> Figure | None:
    """Token similarity, HC/DC and effective rank by layer; one row a setting. None without ``--spectrum-every``."""
    return _by_layer(results, arms, settings, BY_LAYER)


def draw_parameters(results: Results, arms: Sequence[str], settings: Sequence[str]) -> Figure | None:
    """Learnt parameters of the remedies by layer; None where there are none."""
    names = [name for name in results.layers["quantity"].unique() if name not in OF_FEATURES]
    return _by_layer(results, arms, settings, {name: (name, "mean over heads or channels") for name in sorted(names)})


def _by_layer(
    results: Results, arms: Sequence[str], settings: Sequence[str], quantities: dict[str, tuple[str, str]]
) -> Figure | None:
    tables = {name: results.at_last_epoch(name) for name in quantities}
    tables = {name: table for name, table in tables.items() if not table.empty}
    if not tables:
        return None
    columns = min(len(tables), PANELS_A_ROW)
    rows = -(-len(tables) // columns)  # of each setting
    figure, axes = panels(rows * len(settings), columns)
    for part, setting in zip(axes.reshape(len(settings), -1), settings, strict=True):
        for ax in part[len(tables) :]:
            ax.set_visible(False)
        for ax, (name, table) in zip(part, tables.items(), strict=False):
            title, unit = quantities[name]
            here = table[table["setting"] == setting]
            for index, arm in enumerate(arms):
                _band(ax, here[here["arm"] == arm], "layer", "value", index, len(arms) <= MANY_ARMS)
            ax.set_title(f"{title}\n{setting}" if setting else title, fontsize=10)
            ax.set_ylabel(unit)
            layer_axis(ax, 1 + int((table if here.empty else here)["layer"].max()))
    shown = pd.concat(tables.values())["arm"].unique()
    _legend(figure, [arm if arm in shown else "" for arm in arms])
    return figure


def _band(ax: Axes, table: pd.DataFrame, by: str, quantity: str, index: int, with_interval: bool) -> None:
    """One arm's mean over the seeds."""
    if quantity not in table or table.empty:
        return
    found = {at: summarise(rows.to_list()) for at, rows in table.dropna(subset=[quantity]).groupby(by)[quantity]}
    style, apart = line_style(index), max(1, len(found) // 8)
    ax.plot(list(found), [summary.mean for summary in found.values()], markevery=(index % apart, apart), **style)
    if not with_interval:
        return
    low, high = ([getattr(summary, end) for summary in found.values()] for end in ("low", "high"))
    ax.fill_between(list(found), low, high, color=style["color"], alpha=0.15, linewidth=0)


def _legend(figure: Figure, arms: Sequence[str]) -> None:
    handles = [Line2D([], [], label=arm, **line_style(index)) for index, arm in enumerate(arms) if arm]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)
