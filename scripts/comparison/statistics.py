"""Means with intervals, differences paired by seed and corrected for their number, and the detectable difference.

Every number comes from scipy or statsmodels; this file only decides which of their functions answers which question.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

LEVEL = 0.95  # of the intervals; 1 - LEVEL is the rate of false findings of the corrected tests
POWER = 0.8


@dataclass(frozen=True)
class Summary:
    """A quantity of one arm over its seeds, in the quantity's unit.

    Attributes:
        count: Number of seeds.
        mean: Mean over the seeds.
        sd: Standard deviation of the sample (n - 1); nan for one seed.
        low: Lower end of the 95% interval of the mean (Student's t); nan for one seed.
        high: Its upper end.
    """

    count: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline, over the seeds that both have.

    Attributes:
        paired: Summary of the differences, one a seed; its interval is not corrected for the number of arms.
        p: Of the paired t test, two-sided. 1 where all differences are zero, nan where the test is not defined: one
            seed, or differences that are equal but not zero.
        p_corrected: p after Holm's correction, over the arms that were compared with the baseline.
        detectable: Smallest true difference that the corrected test finds with 80% power at this number of seeds and
            this standard deviation (under Bonferroni's correction, which Holm's improves on); nan where there is none.
    """

    paired: Summary
    p: float
    p_corrected: float = math.nan
    detectable: float = math.nan

    @property
    def found(self) -> bool:
        """Whether the corrected test finds a difference."""
        return self.p_corrected < 1 - LEVEL


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and interval.

    Args:
        values: One number a seed; at least one.

    Raises:
        ValueError: If there is none, or one is not finite.
    """
    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"cannot summarise {values.tolist()}: one finite number or more is needed")
    if len(values) == 1:
        return Summary(1, values[0], math.nan, math.nan, math.nan)
    described = DescrStatsW(values, ddof=1)
    low, high = described.tconfint_mean(alpha=1 - LEVEL) if described.std > 0 else (described.mean, described.mean)
    return Summary(len(values), float(described.mean), float(described.std), float(low), float(high))


def differences(arms: dict[str, dict[int, float]], baseline: str) -> dict[str, Difference]:
    """Every arm against the baseline, paired by seed and corrected for the number of arms.

    Args:
        arms: Arm -> seed -> value.
        baseline: One of them.

    Returns:
        Arm -> its difference, without the baseline and without arms that share no seed with it.
    """
    found = {}
    for arm, values in arms.items():
        seeds = sorted(values.keys() & arms[baseline].keys())
        if arm != baseline and seeds:
            found[arm] = _difference([values[seed] - arms[baseline][seed] for seed in seeds])
    return _corrected(found)


def _difference(values: Sequence[float]) -> Difference:
    paired = summarise(values)
    if paired.count > 1 and paired.sd > 0:
        return Difference(paired, float(stats.ttest_1samp(values, 0).pvalue))
    return Difference(paired, 1.0 if paired.count > 1 and paired.mean == 0 else math.nan)


def _corrected(found: dict[str, Difference]) -> dict[str, Difference]:
    tested = {arm: difference.p for arm, difference in found.items() if not math.isnan(difference.p)}
    if not tested:
        return found
    corrected = dict(zip(tested, multipletests(list(tested.values()), method="holm")[1].tolist(), strict=True))
    return {
        arm: replace(
            difference,
            p_corrected=corrected.get(arm, math.nan),
            detectable=detectable(difference.paired.sd, difference.paired.count, len(tested)),
        )
        for arm, difference in found.items()
    }


def detectable(sd: float, count: int, comparisons: int = 1) -> float:
    """The true difference that a paired t test finds with 80% power.

    Args:
        sd: Standard deviation of the differences.
        count: Pairs.
        comparisons: Tests that share the 5%.

    Returns:
        In the unit of ``sd``; nan for fewer than two pairs or no spread.
    """
    return sd * _detectable_effect(count, comparisons) if count > 1 and sd > 0 else math.nan


@cache
def _detectable_effect(count: int, comparisons: int) -> float:
    """In standard deviations."""
    alpha = (1 - LEVEL) / comparisons
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a search that did not converge
        try:
            effect = TTestPower().solve_power(nobs=count, alpha=alpha, power=POWER, alternative="two-sided")
        except (RuntimeWarning, UserWarning, ValueError):
            return math.nan
    return float(np.squeeze(effect))
