"""`rkd.statistics` against SciPy's paired test, a table, and a simulation of the coverage that is promised."""

import math

import numpy as np
import pytest
from scipy import stats

from rkd.statistics import mean_interval, paired_difference


def test_agrees_with_scipy():
    a, b = np.random.default_rng(0).normal(size=(2, 12))
    expected = stats.ttest_rel(a, b)
    ours = paired_difference(a, b)
    assert ours.p == pytest.approx(expected.pvalue)
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_by_hand():
    """Values 1, 2, 3: mean 2, standard error 1/√3, t quantile 4.302653 with two degrees of freedom."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_intervals_hold_together():
    """Five true nulls, 4,000 repetitions: all five intervals cover 0 in at least 95 % of them, within three errors."""
    draws = np.random.default_rng(1).normal(size=(4000, 5, 10))
    together = [all((i := mean_interval(row, comparisons=5)).low <= 0 <= i.high for row in rows) for rows in draws]
    error = math.sqrt(0.95 * 0.05 / 4000)
    assert abs(np.mean(together) - (1 - 0.01) ** 5) < 3 * error


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.9])
def test_interval_and_p_say_the_same(shift):
    for row in np.random.default_rng(2).normal(shift, 1.0, size=(50, 8)):
        interval = mean_interval(row, comparisons=3)
        assert (interval.low <= 0 <= interval.high) == (interval.p > 0.05)


def test_equal_values():
    assert mean_interval([0.25, 0.25]) == (0.25, 0.25, 0.25, 0.0)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [[1.0, 2.0]]])
def test_bad_values(values):
    with pytest.raises(ValueError, match="values must be at least two finite numbers, got"):
        mean_interval(values)


def test_bad_arguments():
    with pytest.raises(ValueError, match="one number for each seed, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="comparisons must be at least 1, got 0"):
        mean_interval([1.0, 2.0], comparisons=0)
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), got 95"):
        mean_interval([1.0, 2.0], confidence=95)
