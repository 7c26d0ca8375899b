"""What every comparison of base and tuned is made of: one record a metric, stages, limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict

from inlay.evaluate.images import Seeing
from inlay.evaluate.losses import Progress
from inlay.evaluate.record import ComparisonRecord, MetricComparison

UNTRAINED = "the base's head is untrained: its outputs are random, and no better than chance"

Stage = Callable[[str, int, int], None]
"""Called with (what is being measured, rows done, rows in all)."""


class Told(TypedDict):
    """How many rows are measured at a time, and what is told as the work goes on."""

    batch_size: int
    on_progress: NotRequired[Stage | None]


class Limits(TypedDict, total=False):
    """How much of the rows is measured at a time, and how much is generated; as for `compare`."""

    generate_rows: int
    max_new_tokens: int
    batch_size: int
    seeing: Seeing | None
    on_progress: Stage | None


def pace(limits: Limits) -> Told:
    return {"batch_size": limits.get("batch_size", 8), "on_progress": limits.get("on_progress")}


def staged(what: str, on_progress: Stage | None) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(what, done, total)


def named(who: str, on_progress: Stage | None) -> Stage | None:
    if on_progress is None:
        return None
    return lambda what, done, total: on_progress(f"{who}: {what}", done, total)


def exponential(value: float) -> float:
    """Return exp(value), infinity where it overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def with_records(
    records: Sequence[MetricComparison], answers: ComparisonRecord, prefix: str
) -> ComparisonRecord:
    metrics = [*records, *(renamed(metric, prefix) for metric in answers["metrics"])]
    return {**answers, "metrics": metrics}


def renamed(metric: MetricComparison, prefix: str) -> MetricComparison:
    mine = metric["name"] in ("loss", "perplexity")
    return {**metric, "name": f"{prefix}_{metric['name']}"} if mine else metric


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
