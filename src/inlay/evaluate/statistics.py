"""Bootstrap intervals and paired permutation tests of metrics on the same rows, by scipy.stats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Swapped = NDArray[np.bool_]
Interval = tuple[float, float]
Statistic = Callable[[Floats], Floats]
"""(..., rows, values of a row) -> (...): a metric of any number of sets of rows at once."""
Separation = Callable[[Floats, Floats], Floats]
"""(..., rows of group 1), (..., rows of group 2) -> (...): how far the groups' scores differ."""

LEVEL = 0.95
RESAMPLES = 2000
PERMUTATIONS = 9999
BATCH = 500
"""Resamples held in memory at once."""
SIGN_FLIP = "two-sided sign-flip permutation test"
SWAP = "two-sided permutation test that swaps base and tuned row by row"


@dataclass(frozen=True)
class PairedResult:
    """The difference tuned - base on the same rows, with its interval and p-value.

    `interval` is None where the difference does not vary, `p_value` is None below two rows.
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
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Return (low, high) of the percentile bootstrap; None below two rows or if constant."""
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return None
    weighted = x * w
    (interval,) = intervals(
        lambda rows: (weighted[rows].sum(axis=-1) / w[rows].sum(axis=-1))[None],
        [np.arange(len(x))],
        level=level,
        resamples=resamples,
        seed=seed,
    )
    return interval


def paired_test(
    base: Sequence[float],
    tuned: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> PairedResult:
    """Test whether the means of tuned and base differ, by flipping the signs of the differences.

    A permutation test assumes no normal distribution and handles ties (exact match has many),
    which Wilcoxon's ranks do not. The test is exact up to 13 rows; beyond, it draws 9,999 random
    flips, so that p is at least 0.0002.

    Args:
        base: one value per row.
        tuned: one value for each of the same rows.
        weights: the weight of each row in the mean, such as its number of tokens.
        seed: the seed of the random flips.
    """
    if len(base) != len(tuned) or not base:
        raise ValueError(f"a paired test needs the same rows, not {len(base)} and {len(tuned)}")
    difference = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    w = np.ones_like(difference) if weights is None else np.asarray(weights, dtype=np.float64)
    weighted = difference * w
    return PairedResult(
        mean_difference=weighted_mean(difference.tolist(), w.tolist()),
        interval=bootstrap_interval(difference.tolist(), weights=w.tolist(), seed=seed),
        p_value=permutation_p(
            lambda swapped: np.where(swapped, -weighted, weighted).sum(axis=-1), len(base), seed
        ),
        test=SIGN_FLIP,
        n=len(base),
    )


def compare_statistic(
    statistic: Statistic,
    base: Sequence[Sequence[float]],
    tuned: Sequence[Sequence[float]],
    *,
    seed: int = 0,
) -> tuple[tuple[float, float], PairedResult, list[Interval | None]]:
    """Test whether a statistic of whole sets of rows, such as a macro F1, differs.

    Under the null hypothesis either model could have given either prediction of a row, so the
    predictions of each row are swapped at random. Intervals are percentile bootstraps over rows.

    Args:
        statistic: the metric.
        base: the values of each row, (rows, values), such as the expected and the predicted class.
        tuned: the same of the tuned model.
        seed: the seed of the resamples and of the swaps.

    Returns:
        the statistic of base and tuned, the test of the difference, and the intervals of both.
    """
    sides = np.stack([np.asarray(side, dtype=np.float64) for side in (base, tuned)])
    count = sides.shape[1]

    def swapped_change(swapped: Swapped) -> Floats:
        first, second = (np.where(swapped[..., None], sides[1 - i], sides[i]) for i in (0, 1))
        return statistic(second) - statistic(first)

    *found, change = side_intervals(
        lambda rows: [statistic(side[rows]) for side in sides], [np.arange(count)], seed=seed
    )
    p = permutation_p(swapped_change, count, seed)
    means = (float(statistic(sides[0])), float(statistic(sides[1])))
    return means, PairedResult(means[1] - means[0], change, p, SWAP, count), found


def compare_groups(
    base: Sequence[float],
    tuned: Sequence[float],
    high: Sequence[bool],
    statistic: Separation,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[PairedResult, list[Interval | None]]:
    """Test whether the tuned scores separate two groups of rows better than the base scores do.

    Under the null hypothesis a row's two scores may be swapped: the difference is compared with
    that of 9,999 random swaps, or of all swaps where there are fewer. On ranks and `auc` this is
    the test of Venkatraman and Begg (Biometrika 83, 1996). For an interval, each group is resampled
    by itself.

    Args:
        base: one score per row.
        tuned: one score for each of the same rows.
        high: whether each row is in the group that should score high; both groups have rows.
        statistic: the separation of the two groups, such as `auc`.
        level: the confidence level of the intervals.
        seed: the seed of swaps and resamples.

    Returns:
        the test of the difference, and the intervals of base and tuned.
    """
    upper = np.asarray(high, dtype=bool)
    groups = [np.flatnonzero(upper), np.flatnonzero(~upper)]
    sides = [np.asarray(scores, dtype=np.float64) for scores in (base, tuned)]

    def separation(scores: Floats) -> Floats:
        return statistic(*(np.take(scores, group, axis=-1) for group in groups))

    def swapped_change(swapped: Swapped) -> Floats:
        first, second = (np.where(swapped, sides[1 - i], sides[i]) for i in (0, 1))
        return separation(second) - separation(first)

    *found, change = side_intervals(
        lambda *drawn: [statistic(*(side[rows] for rows in drawn)) for side in sides],
        groups,
        level=level,
        seed=seed,
        batch=RESAMPLES,
    )
    p = permutation_p(swapped_change, len(upper), seed, batch=PERMUTATIONS)
    difference = float(separation(sides[1])) - float(separation(sides[0]))
    return PairedResult(difference, change, p, SWAP, len(upper)), found


def auc(high: Floats, low: Floats) -> Floats:
    """Return the probability that a row of the first group scores higher; a tie counts half.

    >>> float(auc(np.array([3.0, 2.0]), np.array([1.0, 2.0])))
    0.875
    """
    count = high.shape[-1]
    ranked = stats.rankdata(np.concatenate([high, low], axis=-1), axis=-1)[..., :count]
    return (ranked.sum(axis=-1) - count * (count + 1) / 2) / (count * low.shape[-1])


def difference_of_means(high: Floats, low: Floats) -> Floats:
    return high.mean(axis=-1) - low.mean(axis=-1)


def ranks(scores: Sequence[float]) -> list[float]:
    """Return the rank of each score divided by the number of scores: free of the scores' unit."""
    return (stats.rankdata(scores) / len(scores)).tolist()


def side_intervals(
    estimate: Callable[..., Sequence[Floats]],
    groups: Sequence[Rows],
    *,
    level: float = LEVEL,
    seed: int,
    batch: int = BATCH,
) -> list[Interval | None]:
    if min(map(len, groups)) < 2:
        return [None, None, None]

    def estimates(*drawn: Rows) -> Floats:
        base, tuned = estimate(*drawn)
        return np.stack([base, tuned, tuned - base])

    return intervals(estimates, groups, level=level, seed=seed, batch=batch)


def intervals(
    estimates: Callable[..., Floats],
    groups: Sequence[Rows],
    *,
    level: float,
    seed: int,
    resamples: int = RESAMPLES,
    batch: int = BATCH,
) -> list[Interval | None]:
    """Return a percentile bootstrap interval of each estimate; None where it does not vary.

    Args:
        estimates: (rows drawn of each group, (resamples, rows) each) -> (estimates, resamples).
        groups: the row numbers of each group; rows are drawn within their group.
        level: the confidence level.
        seed: the seed of the resamples.
        resamples: how many are drawn.
        batch: how many of them are held in memory at once.
    """
    result = stats.bootstrap(
        groups,
        lambda *drawn, axis: in_batches(estimates, *(rows.astype(np.intp) for rows in drawn)),
        vectorized=True,
        method="percentile",
        confidence_level=level,
        n_resamples=resamples,
        batch=batch,
        rng=np.random.default_rng(seed),
    )
    ends = zip(*(np.atleast_1d(end).tolist() for end in result.confidence_interval), strict=True)
    return [(low, high) if low < high else None for low, high in ends]


def permutation_p(
    change: Callable[[Swapped], Floats], rows: int, seed: int, *, batch: int = BATCH
) -> float | None:
    """Return the two-sided p-value of a change under random swaps; None below two rows.

    Args:
        change: (whether each row's two values are swapped, (..., rows)) -> tuned - base, (...).
        rows: how many rows there are.
        seed: the seed of the swaps.
        batch: how many swaps are held in memory at once.
    """
    if rows < 2:
        return None
    result = stats.permutation_test(
        (np.zeros(rows), np.ones(rows)),
        lambda first, second, axis: in_batches(change, first > 0),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=batch,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def in_batches(function: Callable[..., Floats], *resamples: NDArray[Any]) -> Floats:
    """Apply a function to some resamples at a time, which saves memory and time."""
    if resamples[0].ndim == 1:
        return function(*resamples)
    starts = range(0, len(resamples[0]), BATCH)
    parts = [function(*(drawn[i : i + BATCH] for drawn in resamples)) for i in starts]
    return np.concatenate(parts, axis=-1)


def pearson(rows: Floats) -> Floats:
    """Return the correlation of expected and predicted; 0 where one of them does not vary."""
    centred = rows - rows.mean(axis=-2, keepdims=True)
    product = (centred[..., 0] * centred[..., 1]).sum(axis=-1)
    spread, size = (np.sqrt((x**2).sum(axis=-2)) for x in (centred, rows))
    varies = (spread > 1e-12 * size).all(axis=-1)
    return np.where(varies, product / np.where(varies, spread.prod(axis=-1), 1.0), 0.0)


def spearman(rows: Floats) -> Floats:
    return pearson(stats.rankdata(rows, axis=-2))
