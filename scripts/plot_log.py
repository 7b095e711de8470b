"""Draws loss, accuracy and learning rate of one or several runs from their ``log.txt`` into a PNG.

    python scripts/plot_log.py logs/attnscale_small_12                     # writes logs/attnscale_small_12/curves.png
    python scripts/plot_log.py logs/deit_small_12 logs/attnscale_small_12 --output curves.png

One colour per run; training is dashed, evaluation solid, the EMA of the weights dotted. A star marks the best
top-1 accuracy of each run, which the legend names.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import entry

if __name__ == "__main__":
    entry.begin()  # before the imports below, which take seconds

from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display and no global state
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from epochlog import LogError, read_log

PALETTE = Path(__file__).resolve().parents[1] / "oversmoothing" / "analysis" / "figures" / "palette.mplstyle"
CYCLE = rc_params_from_file(PALETTE, use_default_template=False)["axes.prop_cycle"].by_key()
FEW_EPOCHS = 12  # up to here every epoch gets a marker, so that a run of one epoch is visible


def run_names(sources: list[Path]) -> list[str]:
    """The shortest endings of the runs' folders that tell them apart."""
    folders = [path.resolve().parent if path.name == "log.txt" else path.resolve() for path in sources]
    longest = max(len(folder.parts) for folder in folders)
    for length in range(1, longest + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return [str(folder) for folder in folders]


def draw(runs: dict[str, list[dict[str, float]]], output: Path, title: str = "") -> None:
    """Writes the figure.

    Args:
        runs: Name -> epochs, as `read_log` gives them.
        output: The PNG file; its folder must exist.
        title: Above the figure; empty: none.
    """
    # A dollar sign is a dollar sign, not mathematics.
    runs, title = {name.replace("$", r"\$"): epochs for name, epochs in runs.items()}, title.replace("$", r"\$")
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    (loss, accuracy), (lr, close_up) = figure.subplots(2, 2)
    for index, (name, epochs) in enumerate(runs.items()):
        style = {
            "color": CYCLE["color"][index % len(CYCLE["color"])],
            "marker": CYCLE["marker"][index % len(CYCLE["marker"])] if len(epochs) <= FEW_EPOCHS else None,
            "markersize": 6,
            "linewidth": 1.5,
        }
        _curve(loss, epochs, "test_loss", label=name, **style)
        _curve(loss, epochs, "train_loss", linestyle="--", markerfacecolor="white", **style)
        _curve(loss, epochs, "test_ema_loss", linestyle=":", **style)
        best = _best(epochs)
        for axes in (accuracy, close_up):
            _curve(axes, epochs, "test_acc1", label=f"{name}: {describe_best(best)}", **style)
            _curve(axes, epochs, "test_ema_acc1", linestyle=":", **style)
            if best is not None:
                star = {"marker": "*", "markersize": 15, "color": style["color"], "markeredgecolor": "black"}
                axes.plot(best["epoch"], best["test_acc1"], zorder=5, **star)
        # Runs of one recipe have the same rates: thinner lines on top leave the earlier ones visible.
        _curve(lr, epochs, "train_lr", label=name, **(style | {"linewidth": 1.5 + 1.8 * (len(runs) - 1 - index)}))

    first, last = (pick(line["epoch"] for epochs in runs.values() for line in epochs) for pick in (min, max))
    middle = (first + last) // 2 if last - first > FEW_EPOCHS else first
    _finish(loss, "Loss", "cross entropy", first, last)
    _finish(accuracy, "Top-1 accuracy on the evaluation images", "%", first, last)
    _finish(close_up, "Top-1 accuracy, " + ("second half" if middle > first else "close up"), "%", middle, last)
    _finish(lr, "Learning rate", "", first, last)
    _zoom(close_up, list(runs.values()), middle)
    accuracy.set_ylim(bottom=0)
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))

    kinds = {"evaluation": "-", "training (augmented images)": "--"}
    if any("test_ema_loss" in line for epochs in runs.values() for line in epochs):
        kinds["evaluation of the EMA"] = ":"
    handles = loss.get_legend_handles_labels()[0]
    handles += [Line2D([], [], color="0.35", linestyle=line, label=kind) for kind, line in kinds.items()]
    loss.legend(handles=handles, fontsize=8)
    accuracy.legend(fontsize=8, loc="lower right")
    lr.legend(fontsize=8)
    if title:
        figure.suptitle(title)
    figure.savefig(output, dpi=110)


def describe_best(best: dict[str, float] | None) -> str:
    """The best accuracy in words."""
    return "not evaluated" if best is None else f"best {best['test_acc1']:.2f}% (epoch {best['epoch']})"


def _curve(axes: Axes, epochs: list[dict[str, float]], key: str, **style: object) -> None:
    """Draws one quantity over the epochs that have it; without any there is only its name in the legend."""
    have = [line for line in epochs if line.get(key) is not None]
    axes.plot([line["epoch"] for line in have], [line[key] for line in have], **style)


def _best(epochs: list[dict[str, float]]) -> dict[str, float] | None:
    """The first epoch with the highest accuracy; None where none was evaluated."""
    evaluated = [line for line in epochs if line.get("test_acc1") is not None]
    return max(evaluated, key=lambda line: line["test_acc1"], default=None)


def _finish(axes: Axes, title: str, unit: str, first: int, last: int) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    margin = max(0.03 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _zoom(axes: Axes, runs: list[list[dict[str, float]]], first: int) -> None:
    """Fits the y axis to the accuracies from epoch ``first`` on."""
    keys = ("test_acc1", "test_ema_acc1")
    shown = [
        line[key]
        for epochs in runs
        for line in epochs
        for key in keys
        if line["epoch"] >= first and line.get(key) is not None
    ]
    if shown:
        margin = max(0.08 * (max(shown) - min(shown)), 0.1)
        axes.set_ylim(min(shown) - margin, max(shown) + margin)


def main(argv: list[str] | None = None) -> int:
    """Command line; see the head of this file. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw loss, accuracy and learning rate of runs from their log.txt.")
    parser.add_argument(
        "runs", type=entry.user_path, nargs="+", metavar="RUN", help="a run's --output_dir, or its log.txt"
    )
    parser.add_argument("--output", type=entry.user_path, help="the PNG file (curves.png in the first run's folder)")
    parser.add_argument("--names", nargs="+", help="names for the legend, one a run (the folders' names)")
    parser.add_argument("--title", default="", help="title of the figure (none)")
    args = parser.parse_args(argv)
    return entry.explained(lambda: _main(args), LogError, OSError)


def _main(args: argparse.Namespace) -> int:
    first = args.runs[0]
    output = args.output or (first if first.is_dir() else first.parent) / "curves.png"
    names = args.names or run_names(args.runs)
    if output.suffix.lower() != ".png":
        raise LogError(f"--output {output}: give a file that ends in .png")
    if len(names) != len(args.runs):
        raise LogError(f"--names {' '.join(names)}: {len(names)} names for {len(args.runs)} runs: give one a run")
    if len(set(names)) != len(names):
        raise LogError(f"{' '.join(names)}: a name twice: give each run once, or other --names")
    runs = {name: read_log(source) for name, source in zip(names, args.runs, strict=True)}
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, output, args.title)
    for name, epochs in runs.items():
        print(f"{name}: {len(epochs)} epoch(s), top-1 {describe_best(_best(epochs))}")
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    entry.run(main)
