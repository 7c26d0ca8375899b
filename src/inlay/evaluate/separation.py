"""How well scores tell two groups of rows apart, and whether two models differ in that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from inlay.evaluate.statistics import FLIPS, Floats, Interval, PairedResult

Rows = NDArray[np.intp]
"""The numbers of some rows."""
Statistic = Callable[[Floats, Floats], float]
"""What the scores of rows that should score high, and of those that should not, amount to."""

RESAMPLES = 2000
SWAP = "two-sided permutation test, base and tuned swapped row by row"


def auc(high: Floats | Sequence[float], low: Floats | Sequence[float]) -> float:
    """Return the chance that a row of the first group scores higher; a tie counts half.

    >>> auc([3.0, 2.0], [1.0, 2.0])
    0.875
    """
    ordered = np.sort(np.asarray(low, dtype=np.float64))
    scores = np.asarray(high, dtype=np.float64)
    below = ordered.searchsorted(scores, "left") + ordered.searchsorted(scores, "right")
    return float(below.sum()) / (2 * len(scores) * len(ordered))


def difference_of_means(high: Floats, low: Floats) -> float:
    """Return by how much more the first group scores, in the mean."""
    return float(np.mean(high)) - float(np.mean(low))


def ranks(scores: Sequence[float]) -> list[float]:
    """Return each score's place among all of them, 0 to 1: it is free of the scores' unit."""
    return (stats.rankdata(scores) / len(scores)).tolist()


def compare_groups(
    base: Sequence[float],
    tuned: Sequence[float],
    high: Sequence[bool],
    statistic: Statistic,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[PairedResult, list[Interval | None]]:
    """Test whether tuned tells two groups of rows apart better than base does.

    Where the two models are alike, a row's two scores may be swapped: the difference is held
    against that of 9,999 random swaps, or of all there are. On ranks and `auc` this is Venkatraman
    and Begg's test (Biometrika 83, 1996). Each group is resampled by itself for an interval.

    Args:
        base: a score a row.
        tuned: a score for each of the same rows.
        high: whether each row is of the group that should score high; there are rows of both.
        statistic: what the two groups' scores amount to.
        level: how often an interval holds the value.
        seed: the seed of swaps and resamples.

    Returns:
        the test of the difference, and the intervals of base and tuned.
    """
    upper = np.asarray(high, dtype=bool)
    sides = [np.asarray(scores, dtype=np.float64) for scores in (base, tuned)]
    groups = (np.flatnonzero(upper), np.flatnonzero(~upper))

    def amount(scores: Floats, first: Rows, second: Rows) -> float:
        return statistic(scores[first.astype(int)], scores[second.astype(int)])

    def change(first: Rows, second: Rows) -> float:
        return amount(sides[1], first, second) - amount(sides[0], first, second)

    test = PairedResult(
        mean_difference=change(*groups),
        interval=interval_of(change, groups, level, seed),
        p_value=swap_p(lambda x, y: amount(y, *groups) - amount(x, *groups), sides, seed),
        test=SWAP,
        n=len(upper),
    )
    return test, [
        interval_of(lambda *drawn, side=side: amount(side, *drawn), groups, level, seed)
        for side in sides
    ]


def interval_of(
    amount: Callable[[Rows, Rows], float], groups: tuple[Rows, Rows], level: float, seed: int
) -> Interval | None:
    """Return the percentile bootstrap interval of what rows of both groups amount to.

    None where resampling can say nothing: fewer than two rows in a group, or always the same value.
    """
    if min(len(group) for group in groups) < 2:
        return None
    result = stats.bootstrap(
        groups,
        amount,
        vectorized=False,
        method="percentile",
        confidence_level=level,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    low, high = (float(end) for end in result.confidence_interval)
    return (low, high) if low < high else None


def swap_p(change: Callable[[Floats, Floats], float], sides: Sequence[Floats], seed: int) -> float:
    """Return the p-value of a difference when each row's two scores may be swapped."""
    result = stats.permutation_test(
        tuple(sides),
        change,
        permutation_type="samples",
        vectorized=False,
        n_resamples=FLIPS,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
