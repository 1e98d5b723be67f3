"""`rkd.statistics` against SciPy, statsmodels and tables, and against simulations of the rates that it promises."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from rkd.statistics import (
    Interval,
    bootstrap_interval,
    equivalence,
    holm,
    mean_interval,
    paired_difference,
    seeds_needed,
)

DRAWS = {"normal": lambda r, n: r.standard_normal(n), "skewed": lambda r, n: r.standard_exponential(n) - 1}
COVERAGE = {  # of Student's interval, and of the bootstrap's
    ("normal", 10): (0.95, 0.90),
    ("normal", 12): (0.95, 0.91),
    ("normal", 20): (0.95, 0.93),
    ("skewed", 10): (0.90, 0.87),
    ("skewed", 12): (0.91, 0.89),
    ("skewed", 20): (0.92, 0.91),
}


def three_errors(rate, repetitions):
    return 3 * math.sqrt(rate * (1 - rate) / repetitions)


def test_intervals_are_written_with_true_minus_signs():
    interval = Interval(1.24, -0.26, 2.7, 0.1)
    assert f"{interval:+.1f}" == "+1.2 [−0.3,\N{NO-BREAK SPACE}+2.7]"
    assert f"{interval:.0f}" == "1 [0,\N{NO-BREAK SPACE}3]"
    assert f"{Interval(-0.001, -0.5, 0.5, 1.0):+.2f}".startswith("+0.00 [−0.50")
    assert str(interval) == f"{interval}" == "Interval(mean=1.24, low=-0.26, high=2.7, p=0.1)"
    assert not interval.certain
    assert Interval(1, 0.1, 2, 0.01).certain
    assert Interval(-1, -2, -0.1, 0.01).certain


class TestIntervals:
    def test_agrees_with_scipy(self):
        a, b = np.random.default_rng(0).normal(size=(2, 12))
        expected = stats.ttest_rel(a, b)
        ours = paired_difference(a, b)
        assert ours.p == pytest.approx(expected.pvalue)
        assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))

    def test_by_hand(self):
        """Values 1, 2, 3: mean 2, standard error 1/√3, t quantile 4.302653 with two degrees of freedom."""
        interval = mean_interval([1.0, 2.0, 3.0])
        assert interval.mean == 2
        assert interval.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)

    @pytest.mark.parametrize(("kind", "n"), COVERAGE)
    def test_coverage_is_what_the_docstrings_say(self, kind, n):
        samples = DRAWS[kind](np.random.default_rng(n), (1000, n))
        student = [mean_interval(row) for row in samples]
        bootstrap = [bootstrap_interval(row, resamples=1000, seed=s) for s, row in enumerate(samples)]
        for intervals, expected in zip((student, bootstrap), COVERAGE[kind, n]):
            measured = np.mean([i.low <= 0 <= i.high for i in intervals])
            assert abs(measured - expected) < 0.005 + three_errors(expected, len(samples))

    def test_intervals_hold_together(self):
        """Five true nulls: all five intervals cover 0 in at least 95 % of the repetitions."""
        draws = np.random.default_rng(1).normal(size=(1000, 5, 10))
        together = [all((i := mean_interval(row, comparisons=5)).low <= 0 <= i.high for row in rows) for rows in draws]
        assert abs(np.mean(together) - (1 - 0.01) ** 5) < three_errors(0.95, 1000)

    @pytest.mark.parametrize("shift", [0.0, 0.4, 0.9])
    def test_interval_and_p_say_the_same(self, shift):
        for row in np.random.default_rng(2).normal(shift, 1.0, size=(50, 8)):
            interval = mean_interval(row, comparisons=3)
            assert (interval.low <= 0 <= interval.high) == (interval.p > 0.05)

    def test_equal_values(self):
        assert mean_interval([0.25, 0.25]) == (0.25, 0.25, 0.25, 0.0)
        assert paired_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0, 1.0)
        assert bootstrap_interval([0.25, 0.25])[:3] == (0.25, 0.25, 0.25)

    def test_bootstrap_is_bca_and_tests_nothing(self):
        values = np.random.default_rng(3).exponential(size=15)
        ours = bootstrap_interval(values, comparisons=4, resamples=5000, seed=8)
        expected = stats.bootstrap(
            (values,), np.mean, method="BCa", confidence_level=0.9875, n_resamples=5000, rng=np.random.default_rng(8)
        ).confidence_interval
        assert ours[:3] == (values.mean(), expected.low, expected.high)
        assert math.isnan(ours.p)

    def test_bootstrap_against_efron_and_tibshirani(self):
        """An Introduction to the Bootstrap, table 2.1, survival of 7 treated mice: mean 86.86, standard error 23.36."""
        mice = [94.0, 197.0, 16.0, 38.0, 99.0, 141.0, 23.0]
        interval = bootstrap_interval(mice, confidence=0.6827)
        assert interval.mean == pytest.approx(86.857, abs=1e-3)
        assert (interval.high - interval.low) / 2 == pytest.approx(23.36, rel=0.05)

    @given(st.lists(st.integers(-50, 50), min_size=2, max_size=12), st.integers(1, 8))
    def test_bootstrap_moves_and_stretches_with_the_values(self, values, factor):
        plain = bootstrap_interval(np.array(values), resamples=400)
        moved = bootstrap_interval(factor * np.array(values) + 3, resamples=400)
        assert moved[:3] == pytest.approx(tuple(factor * x + 3 for x in plain[:3]), abs=1e-6)


class TestEquivalence:
    @pytest.mark.parametrize("margin", [0.1, 0.7, 2.0])
    def test_agrees_with_statsmodels(self, margin):
        a, b = np.random.default_rng(4).normal(size=(2, 12))
        assert equivalence(a, b, margin).p == pytest.approx(ttost_paired(a, b, -margin, margin)[0])

    def test_the_interval_is_that_of_twice_the_error(self):
        a, b = np.random.default_rng(5).normal(size=(2, 12))
        assert equivalence(a, b, 1.0)[:3] == pytest.approx(paired_difference(a, b, confidence=0.9)[:3])
        corrected = paired_difference(a, b, confidence=1 - 2 * 0.05 / 7)
        assert equivalence(a, b, 1.0, comparisons=7)[:3] == pytest.approx(corrected[:3])

    @pytest.mark.parametrize("comparisons", [1, 3])
    def test_interval_and_p_say_the_same(self, comparisons):
        pairs = np.random.default_rng(6).normal(0.0, [[0.5], [1.0], [2.0]], size=(60, 3, 10)).reshape(-1, 10)
        found = [equivalence(row, np.zeros(10), 0.8, comparisons) for row in pairs]
        inside = [i.low > -0.8 and i.high < 0.8 for i in found]
        assert inside == [i.p < 0.05 for i in found]
        assert 0 < sum(inside) < len(found)

    @pytest.mark.parametrize(("margin", "exact"), [(3.0, True), (0.5, False)])
    def test_error_rate_at_the_edge_of_the_margin(self, margin, exact):
        """A true difference equal to the margin passes in 5 % of the cases, or fewer where the margin is narrow."""
        differences = np.random.default_rng(7).normal(margin, 1.0, size=(1500, 12))
        rate = np.mean([equivalence(row, np.zeros(12), margin).p < 0.05 for row in differences])
        assert rate < 0.05 + three_errors(0.05, 1500)
        assert not exact or rate > 0.05 - three_errors(0.05, 1500)

    def test_equal_differences(self):
        assert equivalence([1.0, 2.0], [0.5, 1.5], 1.0) == (0.5, 0.5, 0.5, 0.0)
        assert equivalence([1.0, 2.0], [0.5, 1.5], 0.5) == (0.5, 0.5, 0.5, 1.0)


class TestHolm:
    def test_known_values(self):
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
        assert holm([0.3]) == pytest.approx([0.3])

    def test_agrees_with_statsmodels(self):
        rows = np.random.default_rng(8).uniform(size=(5, 9)) ** 3
        assert holm(rows) == pytest.approx(np.array([multipletests(row, method="holm")[1] for row in rows]))

    @given(arrays(float, st.integers(1, 12), elements=st.floats(0, 1)), st.randoms(use_true_random=False))
    def test_between_the_raw_values_and_bonferroni(self, p, random):
        adjusted = holm(p)
        assert ((adjusted >= p) & (adjusted <= np.minimum(1, len(p) * p))).all()
        assert (np.diff(adjusted[p.argsort()]) >= 0).all()
        shuffled = random.sample(range(len(p)), len(p))
        assert (holm(p[shuffled]) == adjusted[shuffled]).all()

    def test_family_wise_error(self):
        """Eight methods against one baseline, which makes the tests depend on each other. First no method differs, then
        half of them do: at most 5 % of the repetitions may reject a true hypothesis. Holm finds more than Bonferroni.
        """
        runs = np.random.default_rng(9).normal(size=(20_000, 9, 12))
        for real in (0, 4):
            runs[:, 1 : 1 + real] += 1.2
            p = stats.ttest_rel(runs[:, 1:], runs[:, :1], axis=-1).pvalue
            found = {"none": p <= 0.05, "Bonferroni": 8 * p <= 0.05, "Holm": holm(p) <= 0.05}
            wrong = {name: rejected[:, real:].any(1).mean() for name, rejected in found.items()}
            assert wrong["none"] > 0.12
            assert max(wrong["Bonferroni"], wrong["Holm"]) < 0.05 + three_errors(0.05, len(p))
            assert (found["Holm"] >= found["Bonferroni"]).all()
        assert found["Holm"][:, :4].mean() > found["Bonferroni"][:, :4].mean() + 0.02


class TestSeedsNeeded:
    @pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
    def test_cohen_s_small_medium_and_large_effects(self, effect, pairs):
        """As G*Power gives them: paired t test, two-sided, 5 %, power 80 %."""
        assert seeds_needed(1.0, effect) == pairs

    @pytest.mark.parametrize("comparisons", [1, 20])
    @pytest.mark.parametrize("effect", [0.05, 0.3, 1.0, 1.7, 2.5])
    def test_agrees_with_statsmodels(self, effect, comparisons):
        seeds = seeds_needed(3.0, 3.0 * effect, comparisons=comparisons)
        below, reached = (TTestPower().power(effect, n, 0.05 / comparisons) for n in (seeds - 1, seeds))
        assert below < 0.8 <= reached

    @pytest.mark.parametrize("comparisons", [1, 20])
    @pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
    def test_the_power_is_reached(self, power, comparisons):
        seeds = seeds_needed(1.5, 1.0, power, comparisons)
        differences = np.random.default_rng(10).normal(1.0, 1.5, size=(20_000, seeds))
        found = comparisons * stats.ttest_1samp(differences, 0.0, axis=1).pvalue < 0.05
        assert power - three_errors(power, 20_000) < found.mean() < power + 0.05

    def test_extremes(self):
        assert seeds_needed(1e-3, 1e3) == 2
        assert seeds_needed(1.0, 1e-6) == pytest.approx(1e12 * (1.959964 + 0.841621) ** 2, rel=1e-5)

    @given(st.floats(0.05, 3.0), st.floats(0.5, 0.99), st.integers(1, 50))
    def test_harder_questions_need_more(self, effect, power, comparisons):
        seeds = seeds_needed(1.0, effect, power, comparisons)
        assert seeds >= 2
        assert seeds_needed(1.0, effect / 2, power, comparisons) >= seeds
        assert seeds_needed(1.0, effect, power, comparisons + 1) >= seeds
        assert seeds_needed(1.0, effect, (1 + power) / 2, comparisons) >= seeds


@pytest.mark.parametrize("interval", [mean_interval, bootstrap_interval])
@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [[1.0, 2.0]]])
def test_bad_values(interval, values):
    with pytest.raises(ValueError, match="values must be at least two finite numbers, got"):
        interval(values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference([1.0, 2.0], [1.0, 2.0, 3.0]), "one number for each seed, got 2 and 3"),
        (lambda: equivalence([1.0], [1.0, 2.0], 1.0), "one number for each seed, got 1 and 2"),
        (lambda: mean_interval([1.0, 2.0], comparisons=0), "comparisons must be at least 1, got 0"),
        (lambda: equivalence([1.0, 2.0], [1.0, 3.0], 1.0, 0), "comparisons must be at least 1, got 0"),
        (lambda: seeds_needed(1.0, 1.0, comparisons=0), "comparisons must be at least 1, got 0"),
        (lambda: mean_interval([1.0, 2.0], confidence=95), r"confidence must lie in \(0, 1\), got 95"),
        (lambda: bootstrap_interval([1.0, 2.0], confidence=0), r"confidence must lie in \(0, 1\), got 0"),
        (lambda: equivalence([1.0, 2.0], [1.0, 3.0], 1.0, 1, 0.5), r"confidence must lie in \(0.5, 1\), got 0.5"),
        (lambda: equivalence([1.0, 2.0], [1.0, 3.0], -1.0), "margin must be positive and finite, got -1.0"),
        (lambda: equivalence([1.0, 2.0], [1.0, 3.0], math.nan), "margin must be positive and finite, got nan"),
        (lambda: bootstrap_interval([1.0, 2.0], resamples=399), "resamples must be at least 400, .*, got 399"),
        (lambda: bootstrap_interval([1.0, 2.0], 100), "resamples must be at least 40000, .*, got 20000"),
        (lambda: holm([]), r"p_values must be one number or more in \[0, 1\], got \[\]"),
        (lambda: holm([0.1, 1.1]), r"p_values must be one number or more in \[0, 1\], got \[0.1, 1.1\]"),
        (lambda: holm([math.nan]), r"p_values must be one number or more in \[0, 1\], got \[nan\]"),
        (lambda: seeds_needed(0.0, 1.0), "deviation must be positive and finite, got 0.0"),
        (lambda: seeds_needed(1.0, -1.0), "difference must be positive and finite, got -1.0"),
        (lambda: seeds_needed(1.0, 1e-7), "difference must be 1e-6 to 1e6 deviations, got 1e-07 with deviation 1.0"),
        (lambda: seeds_needed(1.0, 1.0, power=80), r"power must lie in \(0, 1\), got 80"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
