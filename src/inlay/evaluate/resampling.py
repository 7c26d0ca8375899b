"""A statistic of whole sets of rows, such as a macro F1: its interval, and a paired test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from inlay.evaluate.record import MetricComparison
from inlay.evaluate.run import LEVEL, record
from inlay.evaluate.statistics import FLIPS, Interval, PairedResult

__all__ = ["compared_statistic"]

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Takes (..., rows, values a row) and returns (...): one number for each set of rows."""

SWAP = "two-sided permutation test that swaps the two models' predictions row by row"
RESAMPLES = 2000
AT_ONCE = 250
"""Resamples held in memory at once."""


def compared_statistic(
    name: str,
    better: Literal["lower", "higher"],
    statistic: Statistic,
    base: Sequence[Sequence[float]],
    tuned: Sequence[Sequence[float]],
    seed: int = 0,
) -> MetricComparison:
    """Return the record of a statistic of base and tuned on the same rows.

    Intervals are percentile bootstraps over rows. Where the two models do not differ, either could
    have given either prediction of a row: p is the share of random swaps, the observed one among
    them, whose difference is at least as large.

    Args:
        name: the metric's name.
        better: whether less or more of it is wanted.
        statistic: the metric, of any number of sets of rows at once.
        base: each row's values, (rows, values), such as what was expected and what was predicted.
        tuned: the same of the tuned model.
        seed: the seed of the resamples and of the swaps.
    """
    sides = np.stack([np.asarray(side, dtype=np.float64) for side in (base, tuned)])
    means = [float(statistic(side)) for side in sides]
    intervals, change = bootstrap(statistic, sides, seed)
    test = PairedResult(
        mean_difference=means[1] - means[0],
        interval=change,
        p_value=swap_p(statistic, sides, seed) if sides.shape[1] > 1 else None,
        test=SWAP,
        n=sides.shape[1],
    )
    return record(name, better, (means[0], means[1]), intervals, test)


def bootstrap(
    statistic: Statistic, sides: Floats, seed: int
) -> tuple[list[Interval | None], Interval | None]:
    """Return the intervals of both sides and of their difference, the same rows drawn for both."""
    rng, count = np.random.default_rng(seed), sides.shape[1]
    found: list[Floats] = []
    for _ in range(0, RESAMPLES, AT_ONCE):
        rows = rng.integers(count, size=(AT_ONCE, count))
        found.append(np.stack([statistic(side[rows]) for side in sides]))
    drawn = np.concatenate(found, axis=1)
    return [interval(side) for side in drawn], interval(drawn[1] - drawn[0])


def interval(drawn: Floats) -> Interval | None:
    """Return the percentile interval of resampled values; None where there is none to be had."""
    if not np.isfinite(drawn).all() or np.ptp(drawn) == 0:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def swap_p(statistic: Statistic, sides: Floats, seed: int) -> float:
    """Return the p-value of a difference under random swaps of the rows' predictions."""
    rng, count = np.random.default_rng(seed), sides.shape[1]
    observed = abs(float(statistic(sides[1])) - float(statistic(sides[0])))
    as_large = 1
    done = 0
    while done < FLIPS:
        size = min(AT_ONCE, FLIPS - done)
        swapped = rng.random((size, count, 1)) < 0.5
        first, second = (np.where(swapped, sides[a], sides[1 - a]) for a in (1, 0))
        difference = np.abs(statistic(second) - statistic(first))
        as_large += int((difference >= observed - 1e-12).sum())
        done += size
    return as_large / (FLIPS + 1)
