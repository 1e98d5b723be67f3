"""What may be said about a difference: intervals and tests for means over seeds, corrected for how many are made.

Runs of one seed share initial weights and batch order, so methods are compared by their differences seed by seed.
Explained in the book: section 2.2, "Experiments".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.floating]


class Interval(NamedTuple):
    """A mean, its confidence interval, and the two-sided p-value of the hypothesis that it is 0."""

    mean: float
    low: float
    high: float
    p: float


def mean_interval(values: Values, comparisons: int = 1, confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of independent values.

    Args:
        values: one number a seed, at least two.
        comparisons: how many such intervals are read together. With m of them each gets confidence 1 − (1 − c)/m and
            p-values are multiplied by m (Bonferroni), so that all m intervals hold at once with probability c at least.
        confidence: c, in (0, 1).

    Returns:
        The interval contains 0 exactly when p > 1 − c. If all values are equal it is a point, and p is 0, or 1 at 0.

    Raises:
        ValueError: fewer than two values, a value that is not finite, `comparisons` < 1, `confidence` outside (0, 1).
    """
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or sample.size < 2 or not np.isfinite(sample).all():
        raise ValueError(f"values must be at least two finite numbers, got {values!r:.80}")
    if comparisons < 1:
        raise ValueError(f"comparisons must be at least 1, got {comparisons!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence!r}")
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean, mean, mean, float(mean == 0))
    from scipy.stats import ttest_1samp

    test = ttest_1samp(sample, 0.0)
    low, high = test.confidence_interval(1 - (1 - confidence) / comparisons)
    return Interval(mean, float(low), float(high), min(1.0, float(test.pvalue) * comparisons))


def paired_difference(a: Values, b: Values, comparisons: int = 1, confidence: float = 0.95) -> Interval:
    """`mean_interval` of a − b, where entry s of both comes from seed s.

    Raises:
        ValueError: as `mean_interval`, or the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"a and b must hold one number for each seed, got {len(a)} and {len(b)}")
    return mean_interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), comparisons, confidence)
