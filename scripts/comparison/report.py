"""The output of a study: tables as CSV and Markdown, figures, and one page that says what may be concluded."""

import html
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

import build
from oversmoothing.analysis.report import html_page, html_picture, html_table
from scripts.comparison.figures import draw_all
from scripts.comparison.flags import Flags, as_words
from scripts.comparison.pairing import Pairing, compare_starts
from scripts.comparison.results import HEADLINE, QUANTITIES, Quantity, Results, collect
from scripts.comparison.statistics import Difference, Summary, differences, summarise
from scripts.comparison.study import Run, Study

READING = (
    "Each arm was trained once a seed; the headline is the accuracy of the last epoch, never the best epoch on the "
    "test set. Square brackets hold the 95% interval of the mean over the seeds (Student's t). A difference is "
    "paired by seed: the run of the arm minus the run of the baseline with the same seed. Its interval holds the "
    "true differences that agree with these runs; it is not corrected for the number of arms. p is that of the "
    "paired t test, corrected by Holm over the arms within a setting and a quantity, not over settings or "
    "quantities. 'Detectable' is the true difference that this test finds with 80% power, given the standard "
    "deviation of these differences."
)


class Comparison(NamedTuple):
    """A quantity in a setting."""

    summaries: dict[str, Summary]  # of each arm
    differences: dict[str, Difference]  # to the baseline, of each other arm that shares seeds with it


class ReportError(ValueError):
    """There is nothing to report on; the message says why."""


def write(study: Study, runs: list[Run], folder: Path, command: str) -> Path:
    """Reads the finished runs and writes everything; returns the path of the page.

    Args:
        study: The study.
        runs: All of its runs.
        folder: ``--output_dir``.
        command: Shown on the page.

    Raises:
        ReportError: If no run is finished.
    """
    arms = [run for run in runs if run.arm in study.arms]
    results = collect(arms, folder / "runs")
    if results.epochs.empty:
        raise ReportError(f"{folder}: no run of this study is finished yet, so there is nothing to report")
    settings = [name for name in study.settings if name in set(results.epochs["setting"])]
    compared = compare_all(results, study, settings)
    pairings = {(setting, arm): pairing for setting in settings for arm, pairing in pair(arms, study, setting).items()}
    results.epochs.to_csv(folder / "results.csv", index=False)
    results.layers.to_csv(folder / "layers.csv", index=False)
    pd.DataFrame(comparison_rows(compared)).to_csv(folder / "comparison.csv", index=False)
    (folder / "table.md").write_text(markdown(study, compared, pairings, results.missing), encoding="utf-8")
    pictures = draw_all(results, list(study.arms), settings, study.baseline)
    for picture in pictures:
        picture.figure.savefig(folder / picture.file, dpi=130)
    page = [
        *(f"<p>{html.escape(text)}</p>" for text in (study.about, READING) if text),
        *(part for setting in settings for part in _tables(study, compared, setting)),
        *(html_picture(picture, folder) for picture in pictures),
        "<h2>What is shared between paired runs</h2>",
        *(f"<p>{html.escape(text)}</p>" for text in describe_pairing(study, settings, pairings)),
        "<h2>How it was made</h2>",
        html_table(["what", "value"], _about(study, results, command).items(), "text"),
    ]
    path = folder / "report.html"
    path.write_text(html_page(study.title, page), encoding="utf-8")
    return path


# ---- numbers ---------------------------------------------------------------------------------------------------------
def compare_all(results: Results, study: Study, settings: Sequence[str]) -> dict[tuple[str, str], Comparison]:
    """(Setting, quantity) -> every arm's summary, and the differences to the baseline."""
    quantities = [name for name in QUANTITIES if name in results.last().columns]
    return {
        (setting, quantity): found
        for setting in settings
        for quantity in quantities
        if (found := compare(results, study, setting, quantity)).summaries
    }


def compare(results: Results, study: Study, setting: str, quantity: str) -> Comparison:
    """One quantity in one setting."""
    values = results.by_arm(quantity, setting)
    values = {arm: values[arm] for arm in study.arms if arm in values}
    summaries = {arm: summarise(list(by_seed.values())) for arm, by_seed in values.items()}
    return Comparison(summaries, differences(values, study.baseline) if study.baseline in values else {})


def comparison_rows(compared: dict[tuple[str, str], Comparison]) -> list[dict[str, Any]]:
    """One row a setting, quantity and arm: the arm's summary and its difference to the baseline."""
    rows = []
    for (setting, quantity), comparison in compared.items():
        for arm, summary in comparison.summaries.items():
            row = {"setting": setting, "quantity": quantity, "arm": arm} | asdict(summary)
            if arm in comparison.differences:
                difference = asdict(comparison.differences[arm])
                paired = {f"difference_{name}": value for name, value in difference.pop("paired").items()}
                row |= paired | difference
            rows.append(row)
    return rows


def pair(runs: Iterable[Run], study: Study, setting: str) -> dict[str, Pairing]:
    """Arm -> what its first seed's run shares with the baseline's, in one setting; without the baseline."""
    first = {run.arm: run for run in runs if run.setting == setting and run.seed == study.seeds[0]}
    baseline = first[study.baseline]
    classes = build.num_classes(baseline.args, build.Start())
    return {arm: compare_starts(run, baseline, classes) for arm, run in first.items() if arm != study.baseline}


# ---- words -----------------------------------------------------------------------------------------------------------
def sentence(arm: str, baseline: str, found: Difference, quantity: Quantity) -> str:
    """What may be said of an arm, in one sentence."""
    unit = "points" if quantity.unit == "%" else quantity.unit
    change = f"{arm} against {baseline}: {_signed(found.paired.mean, quantity)} {unit}"
    if found.paired.count < 2:
        return f"{change} at the one seed that both have, which says nothing about other seeds."
    if found.paired.sd == 0:
        verdict = "no run differs" if found.p == 1 else "the differences have no spread, so there is no test"
        return f"{change} at each of {found.paired.count} seeds: {verdict}."
    interval = f"95% interval {_signed(found.paired.low, quantity)} to {_signed(found.paired.high, quantity)}"
    test = f"p = {_p(found.p_corrected)} after Holm, {found.paired.count} seeds"
    seen = f"a true difference of {_number(found.detectable, quantity)} {unit} would be seen with 80% power"
    if quantity.unit == "%" and found.detectable > 100:
        seen = "with so few seeds and so much spread, no difference at all would be seen with 80% power"
    verdict = "a difference was found" if found.found else f"no difference was found; {seen}"
    return f"{change} ({interval}; {test}): {verdict}."


def describe_pairing(study: Study, settings: Sequence[str], pairings: dict[tuple[str, str], Pairing]) -> list[str]:
    """Paragraphs on what the seed fixes for all arms, and on what was found equal for each arm."""
    paragraphs = [
        "Every random draw of a run is a function of its address: seed, rank, epoch, and position of the image or "
        "step. So runs of the same seed get the same images in the same order with the same augmentation, the same "
        "mixup and the same drop-path decisions, whatever the model computes. The order of the images depends on the"
        " epoch alone and is the same for all seeds; seeds differ in the initial weights and in every other draw. "
        "With --drop, dropout masks are shared only between arms that apply dropout to the same tensors (a remedy "
        "may need all tokens of the last block, where the plain model computes the class token alone). The initial "
        "weights were compared by building the models:"
    ]
    for (setting, arm), found in pairings.items():
        where = f" in {setting}" if len(settings) > 1 else ""
        share = "all" if found.equal == found.of else f"{found.equal:,}"
        text = (
            f"{arm}{where} starts with {share} of the {found.of:,} initial weights of {study.baseline} (equal to the "
            f"bit), and {found.own:,} of its own; its images are {'the same' if found.same_images else 'NOT the same'}."
        )
        if name := study.starts_from(arm):
            text += f" Before the first step it loads the weights of the run {name} of the same seed."
        if found.differing:
            listed = "; ".join(
                f"{name} = {ours} (baseline: {theirs})" for name, (ours, theirs) in found.differing.items()
            )
            text += f" Beside the model it differs in: {listed}."
        paragraphs.append(text)
    return paragraphs


def markdown(
    study: Study,
    compared: dict[tuple[str, str], Comparison],
    pairings: dict[tuple[str, str], Pairing],
    missing: Sequence[str],
) -> str:
    """The tables and sentences of the page as Markdown, the headline first."""
    parts = [f"# {study.title}"]
    for setting in dict.fromkeys(setting for setting, _ in compared):
        parts += [f"## {setting}"] if setting else []
        parts.append(_markdown_table(*headline_table(study, compared, setting)))
        parts.append("\n".join(f"- {text}" for text in sentences(study, compared, setting)))
        parts += [
            f"{arm} also differs from {study.baseline} in {', '.join(found.differing)}."
            for (where, arm), found in pairings.items()
            if where == setting and found.differing
        ]
        parts.append(_markdown_table(*other_table(study, compared, setting)))
    if missing:
        parts.append(f"Missing: {', '.join(missing)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def headline_table(
    study: Study, compared: dict[tuple[str, str], Comparison], setting: str
) -> tuple[list[str], list[list[str]]]:
    """Accuracy of each arm and its difference to the baseline, as text."""
    quantity, found = QUANTITIES[HEADLINE], compared[setting, HEADLINE]
    header = ["arm", "seeds", f"{quantity.label} ({quantity.unit})", "sd", f"minus {study.baseline}", "p (Holm)"]
    rows = []
    for arm, summary in found.summaries.items():
        row = [arm, str(summary.count), _with_interval(summary, quantity), _number(summary.sd, quantity)]
        if (difference := found.differences.get(arm)) is not None:
            row += [_with_interval(difference.paired, quantity, _signed), _p(difference.p_corrected)]
            row += ["> 100" if difference.detectable > 100 else _number(difference.detectable, quantity)]
        rows.append(row + [""] * (len(header) + 1 - len(row)))
    return [*header, "detectable"], rows


def other_table(
    study: Study, compared: dict[tuple[str, str], Comparison], setting: str
) -> tuple[list[str], list[list[str]]]:
    """All other quantities: for each arm the mean with its interval, and the corrected p of the difference."""
    others = {name: found for (where, name), found in compared.items() if where == setting and name != HEADLINE}
    rows = []
    for arm in study.arms:
        cells = []
        for name, found in others.items():
            text = _with_interval(found.summaries[arm], QUANTITIES[name]) if arm in found.summaries else ""
            p = f", p = {_p(found.differences[arm].p_corrected)}" if arm in found.differences else ""
            cells.append(text + p)
        if any(cells):
            rows.append([arm, *cells])
    return ["arm", *(f"{QUANTITIES[name].label} ({QUANTITIES[name].unit})" for name in others)], rows


def sentences(study: Study, compared: dict[tuple[str, str], Comparison], setting: str) -> list[str]:
    """One sentence an arm, on the headline quantity."""
    found = compared[setting, HEADLINE].differences
    return [sentence(arm, study.baseline, difference, QUANTITIES[HEADLINE]) for arm, difference in found.items()]


def _tables(study: Study, compared: dict[tuple[str, str], Comparison], setting: str) -> Iterable[str]:
    yield f"<h2>{html.escape(setting or 'Result')}</h2>"
    yield html_table(*headline_table(study, compared, setting))
    told = "".join(f"<li>{html.escape(text)}</li>" for text in sentences(study, compared, setting))
    header, rows = other_table(study, compared, setting)
    yield f"<ul>{told}</ul>" + html_table(header, [[_unbroken(cell) for cell in row] for row in rows])


def _unbroken(cell: str) -> str:
    """A cell that may break only between the interval and p."""
    return cell.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}p", ", p")


def _about(study: Study, results: Results, command: str) -> dict[str, Any]:
    """What a reader needs to reproduce the numbers, and caveats."""
    about = {
        "command": command,
        "study": study.source,
        "seeds": ", ".join(map(str, study.seeds)),
        "flags of all runs": shlex.join(as_words(study.flags)),
        **{f"arm {name}": _flags(flags) for name, flags in study.arms.items()},
        **{f"setting {name}": _flags(flags) for name, flags in study.settings.items() if name},
        **{f"before the arms: {name}": _flags(flags) for name, flags in study.first.items()},
        "processes of each run": study.processes,
        "time of all runs": str(timedelta(seconds=int(results.seconds))),
        "revision of the code": ", ".join(results.revisions),
        "torch": ", ".join(results.versions),
    }
    if len(results.revisions) > 1:
        about["note"] = "the runs were made by different revisions of the code"
    if results.missing:
        about["MISSING runs"] = ", ".join(results.missing)
    return about


def _flags(flags: Flags) -> str:
    return shlex.join(as_words(flags)) or "no flag of its own"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows] if rows and len(header) > 1 else []
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: float, quantity: Quantity) -> str:
    return "–" if math.isnan(value) else f"{value:.{quantity.digits}f}"


def _signed(value: float, quantity: Quantity) -> str:
    return "–" if math.isnan(value) else f"{value:+.{quantity.digits}f}"


def _with_interval(summary: Summary, quantity: Quantity, form: Any = _number) -> str:
    if math.isnan(summary.low):
        return form(summary.mean, quantity)
    return f"{form(summary.mean, quantity)} [{form(summary.low, quantity)}, {form(summary.high, quantity)}]"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
