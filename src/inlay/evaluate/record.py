"""The JSON records of a run: run.json, metrics, comparison and merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

from inlay.evaluate.statistics import (
    Interval,
    PairedResult,
    Statistic,
    bootstrap_interval,
    compare_statistic,
    paired_test,
    weighted_mean,
)

Better = Literal["lower", "higher"]


class Trainable(TypedDict):
    """The trained parameters; `total` and `percent` are of the base."""

    count: int
    percent: float
    total: int


class Run(TypedDict, total=False):
    """run.json: model, data, sizes in bytes, and time in seconds."""

    model: str
    task: str
    method: str
    data: str
    seed: int
    trainable: Trainable
    peak_memory_bytes: int
    adapter_bytes: int
    model_bytes: int
    seconds: float
    config: dict[str, Any]
    versions: dict[str, str]
    base_sha256: str
    data_sha256: str


class Step(TypedDict, total=False):
    """One line of metrics.jsonl; losses are in nats per trained token."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    eval_loss: float


class Score(TypedDict):
    """A metric with its bootstrap interval; None where it is not known."""

    value: float | None
    low: float | None
    high: float | None


class MetricComparison(TypedDict):
    """One metric of base and tuned on the same rows, with the paired test of the difference."""

    name: str
    better: str
    rows: int
    base: Score
    tuned: Score
    difference: Score
    p_value: float | None
    test: str


class ExampleRecord(TypedDict):
    """The prompt and reference of a row, and the answer of each model."""

    line: int
    prompt: str
    reference: str
    base: str
    tuned: str
    images: NotRequired[list[str]]
    """Thumbnails of the row's images as data: addresses; absent where rows have no images."""


class BaselineRecord(TypedDict):
    """A constant baseline against tuned."""

    about: str
    metrics: list[MetricComparison]


class ClassRecord(TypedDict):
    """The tuned model on one class; None where no row has the class or is predicted so."""

    label: str
    rows: int
    precision: float | None
    recall: float | None
    f1: float | None


class ComparisonRecord(TypedDict):
    """Base against tuned; the optional keys depend on the task."""

    rows: int
    tokens: int
    generated_rows: int
    level: float
    metrics: list[MetricComparison]
    examples: list[ExampleRecord]
    counted: NotRequired[str]
    """Which tokens are counted, if not the trained tokens of the rows."""
    note: NotRequired[str]
    """A note about the base."""
    baseline: NotRequired[BaselineRecord]
    classes: NotRequired[list[ClassRecord]]
    confusion: NotRequired[list[list[int]]]
    """Of the tuned model: number of rows by expected class (line) and predicted class (column)."""


class Merge(TypedDict, total=False):
    """The merged model against the adapted model on the same inputs."""

    checked: str
    max_logit_difference: float
    kl: float
    top1_agreement: float
    effect_kept: float
    surviving_fraction: float
    dtype: str
    rows: int


def compared_means(
    name: str, better: Better, base: Sequence[float], tuned: Sequence[float]
) -> MetricComparison:
    return metric_record(
        name,
        better,
        (weighted_mean(base), weighted_mean(tuned)),
        [bootstrap_interval(values) for values in (base, tuned)],
        paired_test(base, tuned),
    )


def compared_statistic(
    name: str,
    better: Better,
    statistic: Statistic,
    base: Sequence[Sequence[float]],
    tuned: Sequence[Sequence[float]],
    seed: int = 0,
) -> MetricComparison:
    means, test, sides = compare_statistic(statistic, base, tuned, seed=seed)
    return metric_record(name, better, means, sides, test)


def metric_record(
    name: str,
    better: Better,
    means: tuple[float, float],
    sides: Sequence[Interval | None],
    test: PairedResult,
    change: float | None = None,
) -> MetricComparison:
    """Return the record of one metric; a `change` that is not the test's own has no interval."""
    difference = (
        score(test.mean_difference, test.interval) if change is None else score(change, None)
    )
    return {
        "name": name,
        "better": better,
        "rows": test.n,
        "base": score(means[0], sides[0]),
        "tuned": score(means[1], sides[1]),
        "difference": difference,
        "p_value": test.p_value,
        "test": test.test,
    }


def score(value: float, interval: Interval | None) -> Score:
    low, high = interval if interval is not None else (math.nan, math.nan)
    return {"value": finite(value), "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
