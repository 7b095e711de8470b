"""The statistics of a comparison: against closed forms, and what they find over many simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from scripts.comparison.statistics import detectable, differences, summarise

pytestmark = pytest.mark.usefixtures("little_garbage")


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_a_mean_and_its_interval_have_their_closed_form() -> None:
    # 1, 2, 3: mean 2, sd 1; t(0.975; 2) = 4.302653, so the interval is 2 -+ 4.302653 / sqrt(3).
    summary = summarise([1, 2, 3])
    assert (summary.count, summary.mean, summary.sd) == (3, 2.0, 1.0)
    assert summary.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert summary.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)


def test_one_seed_has_a_mean_only_and_none_is_an_error() -> None:
    assert summarise([5.0]).mean == 5 and math.isnan(summarise([5.0]).sd) and math.isnan(summarise([5.0]).low)
    equal = summarise([4.0, 4.0])
    assert (equal.sd, equal.low, equal.high) == (0, 4, 4)
    for values in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="finite number"):
            summarise(values)


def test_differences_are_paired_by_seed() -> None:
    plain = [70.0, 80.0, 90.0, 60.0]
    found = differences({"plain": by_seed(plain), "x": by_seed([71.0, 82.0, 91.0, 62.0])}, "plain")["x"]
    # Differences 1, 2, 1, 2: mean 1.5, sd 0.57735, t = 1.5 / (0.57735 / 2) = 5.19615 with 3 degrees of freedom.
    assert found.paired.mean == pytest.approx(1.5) and found.paired.sd == pytest.approx(1 / math.sqrt(3))
    assert found.p == pytest.approx(2 * stats.t.sf(5.196152, 3), rel=1e-6)
    assert found.p_corrected == found.p  # one arm
    # The order of the seeds does not matter, their pairing does.
    shuffled = {3: 62.0, 0: 71.0, 2: 91.0, 1: 82.0}
    assert differences({"x": shuffled, "plain": by_seed(plain)}, "plain")["x"] == found
    crossed = differences({"plain": by_seed(plain), "x": by_seed([82.0, 71.0, 62.0, 91.0])}, "plain")["x"]
    assert crossed.paired.mean == pytest.approx(1.5) and crossed.p > 0.5


def test_seeds_that_one_arm_lacks_are_left_out() -> None:
    found = differences({"plain": {0: 1.0, 1: 2.0, 2: 3.0}, "x": {1: 3.0, 2: 5.0, 7: 100.0}, "y": {9: 1.0}}, "plain")
    assert list(found) == ["x"] and found["x"].paired.count == 2 and found["x"].paired.mean == 1.5


def test_holm_multiplies_the_smallest_p_by_the_number_of_arms() -> None:
    rng = np.random.default_rng(0)
    arms = {"plain": by_seed([0.0] * 6)}
    arms |= {name: by_seed((rng.normal(0, 1, 6) + shift).tolist()) for name, shift in (("a", 3), ("b", 0.5), ("c", 0))}
    found = differences(arms, "plain")
    first, second, third = sorted(found.values(), key=lambda difference: difference.p)
    assert first.p_corrected == pytest.approx(3 * first.p)
    assert second.p_corrected == pytest.approx(max(2 * second.p, first.p_corrected))
    assert third.p_corrected == pytest.approx(min(1, max(third.p, second.p_corrected)))


def test_equal_runs_differ_in_nothing_and_equal_differences_have_no_test() -> None:
    plain = by_seed([70.0, 80.0, 90.0])
    arms = {"plain": plain, "same": plain, "shifted": {seed: value + 1 for seed, value in plain.items()}}
    found = differences(arms, "plain")
    assert found["same"].p == found["same"].p_corrected == 1 and not found["same"].found
    assert math.isnan(found["same"].detectable)
    assert math.isnan(found["shifted"].p) and not found["shifted"].found


@pytest.mark.parametrize(("count", "comparisons"), [(3, 1), (5, 1), (5, 8), (20, 1), (20, 8)])
def test_the_detectable_difference_is_found_in_80_percent_of_studies(count: int, comparisons: int) -> None:
    """By simulation, and by the non-central t distribution."""
    effect = detectable(2.0, count, comparisons)
    critical = stats.t.ppf(1 - 0.05 / comparisons / 2, count - 1)
    shift = effect / 2.0 * math.sqrt(count)
    power = stats.nct.sf(critical, count - 1, shift) + stats.nct.cdf(-critical, count - 1, shift)
    assert power == pytest.approx(0.8, abs=1e-4)
    studies = np.random.default_rng(0).normal(effect, 2.0, (4000, count))
    assert (stats.ttest_1samp(studies, 0, axis=1).pvalue < 0.05 / comparisons).mean() == pytest.approx(0.8, abs=0.025)


def test_without_spread_or_pairs_no_difference_is_detectable() -> None:
    assert math.isnan(detectable(0.0, 5)) and math.isnan(detectable(1.0, 1)) and math.isnan(detectable(math.nan, 5))


def test_twenty_studies_of_equal_arms_find_about_one_difference() -> None:
    """Arms that differ by luck alone: at 5%, one study in twenty finds something, with eight arms too."""
    for others in (1, 8):
        findings = 0
        for study in range(200):
            rng = np.random.default_rng((study, others))
            of_seed = rng.normal(0, 5, 6)  # what the runs of a seed share
            arms = {f"arm{i}": by_seed((80 + of_seed + rng.normal(0, 1, 6)).tolist()) for i in range(others + 1)}
            findings += any(difference.found for difference in differences(arms, "arm0").values())
        assert 2 <= findings <= 20  # of 200 at 5%: 10, give or take three standard deviations


def test_pairing_finds_what_the_seeds_would_hide() -> None:
    rng = np.random.default_rng(0)
    of_seed = rng.normal(0, 10, 6)
    plain, better = 80 + of_seed + rng.normal(0, 0.5, 6), 82 + of_seed + rng.normal(0, 0.5, 6)
    assert differences({"plain": by_seed(plain), "better": by_seed(better)}, "plain")["better"].found
    assert stats.ttest_ind(plain, better).pvalue > 0.5
