"""What a run leaves behind, as the JSON files hold it: run, metrics, comparison, merge."""

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
    """How much of the model trains; `percent` is of `total`, the base's parameters."""

    count: int
    percent: float
    total: int


class Run(TypedDict, total=False):
    """run.json: what was trained, on what, and what it took. Sizes in bytes, `seconds` of time."""

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
    """A mean over rows with its bootstrap interval; None where it is not known."""

    value: float | None
    low: float | None
    high: float | None


class MetricComparison(TypedDict):
    """One metric of base and tuned on the same rows, and the paired test of their difference."""

    name: str
    better: str
    rows: int
    base: Score
    tuned: Score
    difference: Score
    p_value: float | None
    test: str


class ExampleRecord(TypedDict):
    """One row's prompt, its reference, and what each model wrote."""

    line: int
    prompt: str
    reference: str
    base: str
    tuned: str
    images: NotRequired[list[str]]
    """What the row shows, small, as data: addresses; absent where rows have no images."""


class BaselineRecord(TypedDict):
    """What knows the labels' shares alone, in the base's place."""

    about: str
    metrics: list[MetricComparison]


class ClassRecord(TypedDict):
    """How the tuned model does on one class; None where nothing was there, or predicted."""

    label: str
    rows: int
    precision: float | None
    recall: float | None
    f1: float | None


class ComparisonRecord(TypedDict):
    """Base against tuned, as `Comparison.to_dict` gives it; more of it where there are labels."""

    rows: int
    tokens: int
    generated_rows: int
    level: float
    metrics: list[MetricComparison]
    examples: list[ExampleRecord]
    counted: NotRequired[str]
    """What the tokens are, where they are not the trained ones of the rows."""
    note: NotRequired[str]
    """What is to be known of the base."""
    baseline: NotRequired[BaselineRecord]
    classes: NotRequired[list[ClassRecord]]
    confusion: NotRequired[list[list[int]]]
    """Of the tuned model: rows of each class (a line) by what was predicted (a column)."""


class Merge(TypedDict, total=False):
    """How near the merged model is to the adapted one, on real inputs."""

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
    """Return the record of a metric that is a mean over rows, from one value per row."""
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
    """Return the record of a statistic of whole sets of rows; arguments of `compare_statistic`."""
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
    """Return a value and its interval, with None for what JSON cannot hold."""
    low, high = interval if interval is not None else (math.nan, math.nan)
    return {"value": finite(value), "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
