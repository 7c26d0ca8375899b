"""How sure a mean is, and whether two models differ on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Interval = tuple[float, float]

SIGN_FLIP = "two-sided sign-flip permutation test"
FLIPS = 9999
MEMORY_ROWS = 500
"""Resamples held in memory at once."""


@dataclass(frozen=True)
class PairedResult:
    """The difference tuned - base over the same rows, and how likely chance alone makes it.

    `interval` is None where no interval can be had, `p_value` is None below two rows.
    """

    mean_difference: float
    interval: Interval | None
    p_value: float | None
    test: str
    n: int


def weighted_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Return sum(weight * value) / sum(weight); the plain mean where no weights are given."""
    return float(np.average(np.asarray(values, dtype=np.float64), weights=weights))


def bootstrap_interval(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Return the percentile bootstrap interval (low, high) of the (weighted) mean over rows.

    None where resampling can say nothing: fewer than two rows, or all rows with the same value.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return None
    result = stats.bootstrap(
        (x * w, w),
        ratio_of_sums,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=level,
        n_resamples=resamples,
        batch=MEMORY_ROWS,
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def ratio_of_sums(numerator: Floats, denominator: Floats, axis: int) -> Floats:
    """Return sum(numerator) / sum(denominator) along an axis."""
    return numerator.sum(axis=axis) / denominator.sum(axis=axis)


def paired_test(
    base: Sequence[float],
    tuned: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> PairedResult:
    """Test whether tuned differs from base on the same rows, by flipping the differences' signs.

    A permutation test needs no normal distribution and takes ties (exact match has many) as they
    are, which Wilcoxon's ranks do not. It is exact up to 13 rows; beyond, 9,999 random flips, so
    that p is at least 0.0002.

    Args:
        base: one value a row.
        tuned: one value for each of the same rows.
        weights: each row's share in the mean, such as its number of tokens.
        seed: the seed of the random flips.

    Raises:
        ValueError: the two do not have one value for each of the same rows.
    """
    if len(base) != len(tuned) or not base:
        raise ValueError(f"a paired test needs the same rows, not {len(base)} and {len(tuned)}")
    difference = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    w = np.ones_like(difference) if weights is None else np.asarray(weights, dtype=np.float64)
    return PairedResult(
        mean_difference=weighted_mean(difference.tolist(), w.tolist()),
        interval=bootstrap_interval(difference.tolist(), weights=w.tolist(), seed=seed),
        p_value=sign_flip_p(difference * w, seed) if len(difference) > 1 else None,
        test=SIGN_FLIP,
        n=len(difference),
    )


def sign_flip_p(difference: Floats, seed: int) -> float:
    """Return the p-value of a sum of differences under random signs."""
    result = stats.permutation_test(
        (difference,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=MEMORY_ROWS,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
