"""From logs to tables and the page: what is found in simulated studies, and what the page says of it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from runs import tiny_tree
from studies import ARMS, FLAGS, accuracies, study_of, write_run

from oversmoothing.analysis.figures import line_style
from scripts.comparison import report
from scripts.comparison.figures import draw_curves, draw_depth, draw_parameters, explain_bands
from scripts.comparison.results import collect
from scripts.comparison.statistics import Difference, Summary
from scripts.comparison.study import Study

pytestmark = pytest.mark.usefixtures("little_garbage")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("data"))


def simulated(folder: Path, study: Study, values: dict[str, np.ndarray]) -> Study:
    """A study whose runs ended with these accuracies, arm by arm and seed by seed."""
    for run in study.runs():
        write_run(folder / "runs", run, float(values[run.arm][run.seed]))
    return study


def found(study: Study, folder: Path) -> report.Comparison:
    return report.compare(collect(study.runs(), folder / "runs"), study, "", "test_acc1")


def test_a_study_becomes_tables_and_a_page_that_needs_no_other_file(data: Path, tmp_path: Path) -> None:
    arms = ARMS | {"tuned": ARMS["plain"] | {"lr": 1e-3, "model-kwargs": {"qkv_bias": False}}}
    settings = {"short": {}, "long": {"epochs": 3}}
    flags = FLAGS | {"data-path": str(data)}
    study = study_of(arms=arms, seeds=3, flags=flags, settings=settings, title="A <study>", about="On digits.")
    values = {"plain": [80.0, 82.0, 84.0], "attnscale": [81.0, 84.0, 85.0], "tuned": [80.0, 82.0, 84.0]}
    simulated(tmp_path, study, {arm: np.array(row) for arm, row in values.items()})
    page = report.write(study, study.runs(), tmp_path, command="compare.py study.toml").read_text()
    assert "A &lt;study&gt;" in page and not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count('src="data:image/png;base64,') == 5  # differences, settings, curves, depth, lambda
    assert "attnscale in short starts with all of the" in page and "its images are the same" in page
    assert "tuned in short starts with" in page
    assert "lr = 0.001 (baseline: 0.0005); model_kwargs qkv_bias = False (baseline: None)" in page

    table = (tmp_path / "table.md").read_text()
    # 1, 2, 1: mean 1.33, sd 0.577, t(0.975; 2) = 4.303, so 1.33 -+ 1.434; p = 0.0572, times two arms; "tuned" is equal.
    assert "| attnscale | 3 | 83.33 [78.16, 88.50] | 2.08 | +1.33 [-0.10, +2.77] | 0.114 |" in table
    assert (
        "attnscale against plain: +1.33 points (95% interval -0.10 to +2.77; p = 0.114 after Holm, 3 seeds): no "
        in table
    )
    assert "tuned against plain: +0.00 points at each of 3 seeds: no run differs." in table
    assert "tuned also differs from plain in lr, model_kwargs qkv_bias." in table

    epochs = pd.read_csv(tmp_path / "results.csv")
    assert len(epochs) == 3 * 3 * (2 + 3) and {"setting", "arm", "seed", "epoch", "test_acc1"} <= set(epochs.columns)
    layers = pd.read_csv(tmp_path / "layers.csv")
    assert set(layers["quantity"]) == {"token_similarity", "hc_dc_mlp", "effective_rank", "lamb"}
    results = collect(study.runs(), tmp_path / "runs")
    figures = [draw(results, list(study.arms), list(settings)) for draw in (draw_depth, draw_parameters)]
    assert [len(figure.axes) for figure in figures] == [2 * 3, 2 * 1]  # similarity, HC/DC and rank; lambda
    rows = pd.read_csv(tmp_path / "comparison.csv").set_index(["setting", "quantity", "arm"])
    assert rows.loc[("long", "test_acc1", "attnscale"), "difference_mean"] == pytest.approx(4 / 3)
    # Of the block before the last, which three layers have at index 1.
    assert rows.loc[("short", "token_similarity", "plain"), "mean"] == pytest.approx(0.2 + 0.082)
    assert rows.loc[("short", "hc_dc_mlp", "plain"), "mean"] == 2.0


def test_many_arms_stay_apart_and_leave_out_what_would_hide_them(tmp_path: Path) -> None:
    study = study_of(seeds=2, arms={f"arm {i}": ARMS["plain"] for i in range(9)})
    simulated(tmp_path, study, {arm: accuracies(99, 3, 2, i) for i, arm in enumerate(study.arms)})
    results = collect(study.runs(), tmp_path / "runs")
    looks = [tuple(line_style(index)[key] for key in ("color", "marker")) for index in range(9)]
    assert len(set(looks)) == 9
    for arms, bands in ((list(study.arms), 0), (list(study.arms)[:3], 3)):
        accuracy = draw_curves(results, arms, [""]).axes[0]
        assert len(accuracy.lines) == len(arms) and len(accuracy.collections) == bands
        assert accuracy.get_ylim()[1] <= 100
        assert ("so many arms" in explain_bands(arms)) == (bands == 0)
    layers = results.layers.to_dict("records")
    for number in range(6):
        layers += [row | {"quantity": f"lamb_{number}"} for row in layers if row["quantity"] == "hc_dc_mlp"]
    figure = draw_parameters(replace(results, layers=pd.DataFrame(layers)), list(study.arms), [""])
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 4)


def test_a_difference_that_accuracies_cannot_have_is_not_promised() -> None:
    noisy = Difference(Summary(3, 5.0, 40.0, -94.4, 104.4), 0.8, 1.0, detectable=190.0)
    said = report.sentence("both", "plain", noisy, report.QUANTITIES["test_acc1"])
    assert "no difference at all would be seen with 80% power" in said and "190" not in said


def test_of_twenty_studies_of_arms_that_differ_by_luck_about_one_finds_something(tmp_path: Path) -> None:
    findings = 0
    for number in range(20):
        of_seed = np.random.default_rng((1, number)).normal(0, 4, 5)
        study = study_of(seeds=5)
        values = {arm: accuracies(80, 1, 5, 100 * number + i, of_seed) for i, arm in enumerate(study.arms)}
        simulated(tmp_path / str(number), study, values)
        findings += found(study, tmp_path / str(number)).differences["attnscale"].found
    assert findings <= 4  # 5% of 20 is one; five or more have a probability of 0.3%


def test_what_label_noise_costs_is_found(tmp_path: Path) -> None:
    """3.4 points are what 10% of wrong labels cost the digits at 12 layers; runs of a seed differ by 1 point."""
    of_seed = np.random.default_rng(1).normal(0, 4, 5)
    values = {"plain": accuracies(80, 0.7, 5, 0, of_seed), "noisy": accuracies(76.6, 0.7, 5, 1, of_seed)}
    study = simulated(tmp_path, study_of(seeds=5, arms={"plain": ARMS["plain"], "noisy": ARMS["attnscale"]}), values)
    comparison = found(study, tmp_path)
    difference = comparison.differences["noisy"]
    assert difference.found and difference.paired.low < -3.4 < difference.paired.high
    sentence = report.sentence("noisy", "plain", difference, report.QUANTITIES["test_acc1"])
    assert sentence.endswith(": a difference was found.")


def test_equal_arms_find_nothing(tmp_path: Path) -> None:
    study = study_of(seeds=3, arms={"plain": ARMS["plain"], "same": ARMS["plain"]})
    simulated(tmp_path, study, {arm: accuracies(80, 3, 3, 0) for arm in study.arms})
    difference = found(study, tmp_path).differences["same"]
    assert difference.paired.mean == 0 and difference.p == 1 and not difference.found


def test_runs_that_are_missing_are_named_and_left_out(data: Path, tmp_path: Path) -> None:
    study = study_of(seeds=2, flags=FLAGS | {"data-path": str(data)})
    first, *_, last = study.runs()
    with pytest.raises(report.ReportError, match="no run of this study is finished yet"):
        report.write(study, study.runs(), tmp_path, command="")
    for run in study.runs()[:-1]:
        write_run(tmp_path / "runs", run, 80.0)
    write_run(tmp_path / "runs", last, 99.0, epochs=1, finished=False)
    page = report.write(study, study.runs(), tmp_path, command="").read_text()
    assert last.folder in page and "MISSING runs" in page
    assert "at the one seed that both have" in page  # seed 0


def test_the_epoch_that_the_validation_split_chose_is_a_quantity_of_its_own(tmp_path: Path) -> None:
    study = study_of(seeds=2, flags=FLAGS | {"epochs": 3})
    for run in study.runs():
        path = write_run(tmp_path / "runs", run, 90.0)
        lines = (path / "log.txt").read_text().splitlines()
        lines = [line[:-1] + f', "val_acc1": {value}}}' for line, value in zip(lines, (40, 70, 60), strict=True)]
        (path / "log.txt").write_text("\n".join(lines) + "\n")
    last = collect(study.runs(), tmp_path / "runs").last()
    assert last["test_acc1"].tolist() == [90.0] * 4  # the last epoch
    assert last["acc1_at_best_val"].tolist() == [pytest.approx(60.0)] * 4  # the second of three
