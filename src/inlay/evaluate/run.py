"""Base against tuned on the same rows: losses, generated text, uncertainty, a paired test."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from inlay.data.picture import Picture
from inlay.errors import DataError
from inlay.evaluate.generation import context_length, generate
from inlay.evaluate.images import Seeing, joining, thumbnail
from inlay.evaluate.losses import EncodedRow, Progress, RowLoss, losses
from inlay.evaluate.metrics import metrics_for
from inlay.evaluate.record import (
    ComparisonRecord,
    ExampleRecord,
    MetricComparison,
    compared_means,
    metric_record,
)
from inlay.evaluate.statistics import (
    LEVEL,
    bootstrap_interval,
    paired_test,
    weighted_mean,
)
from inlay.model.adapters.attach import disabled

__all__ = ["Comparison", "Evaluation", "compare", "evaluate", "generate", "losses"]

EXAMPLES = 3

Stage = Callable[[str, int, int], None]
"""Called with (what is being measured, rows done, rows in all)."""


class Told(TypedDict):
    """How many rows are measured at a time, and what is told as the work goes on."""

    batch_size: int
    on_progress: NotRequired[Stage | None]


class Rows(Protocol):
    """Rows of data, as the data room reads them, with the line each came from."""

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows: prompt and completion, messages, or text."""
        ...

    @property
    def lines(self) -> Sequence[int]:
        """The line of each row in its file."""
        ...


@dataclass(frozen=True)
class Sample:
    """A row to generate for: the tokens up to its last completion, and that completion's text."""

    row: int
    line: int
    prompt: tuple[int, ...]
    reference: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What one model does on the rows: the loss of each, and the text and scores of some."""

    losses: tuple[RowLoss, ...]
    texts: tuple[str, ...]
    scores: dict[str, tuple[float, ...]]

    @property
    def loss(self) -> float:
        """The mean over all trained tokens, in nats per token."""
        return weighted_mean([r.per_token for r in self.losses], [r.tokens for r in self.losses])

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return exponential(self.loss)


@dataclass(frozen=True)
class Comparison:
    """Base and tuned on the same rows."""

    base: Evaluation
    tuned: Evaluation
    samples: tuple[Sample, ...]
    prompts: tuple[str, ...]
    """The samples' prompts as text."""

    def to_dict(self) -> ComparisonRecord:
        """Return the comparison as JSON can hold it; None stands for what is not known."""
        return {
            "rows": len(self.base.losses),
            "tokens": sum(r.tokens for r in self.base.losses),
            "generated_rows": len(self.samples),
            "level": LEVEL,
            "metrics": [*loss_records(self), *score_records(self)],
            "examples": [
                example_record(sample, prompt, base, tuned)
                for sample, prompt, base, tuned in zip(
                    self.samples[:EXAMPLES],
                    self.prompts[:EXAMPLES],
                    self.base.texts[:EXAMPLES],
                    self.tuned.texts[:EXAMPLES],
                    strict=True,
                )
            ],
        }


def example_record(sample: Sample, prompt: str, base: str, tuned: str) -> ExampleRecord:
    """Return one sample with what both models wrote, and what it shows, if it shows something."""
    record = ExampleRecord(
        line=sample.line, prompt=prompt, reference=sample.reference, base=base, tuned=tuned
    )
    if sample.pictures:
        record["images"] = [thumbnail(picture) for picture in sample.pictures]
    return record


def compare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    encoded: Sequence[EncodedRow],
    *,
    generate_rows: int = 32,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seeing: Seeing | None = None,
    on_progress: Stage | None = None,
) -> Comparison:
    """Measure the model with its active adapters, and without, on the same rows.

    Args:
        model: a causal language model with an adapter on it.
        tokenizer: the model's tokenizer.
        rows: the held-out rows.
        encoded: the same rows as tokens, one for one.
        generate_rows: how many rows to generate for, spread evenly over those with a prompt that
            leaves room for an answer in the model's context.
        max_new_tokens: tokens to generate for a row, at most.
        batch_size: rows in one forward pass.
        seeing: gives what the model sees of rows with images.
        on_progress: called as the work goes on.

    Raises:
        DataError: there are no rows, or one has no token to measure.
        ModelError: a loss is not finite, or the model cannot generate text.
    """
    samples = choose_samples(rows, encoded, generate_rows, context_length(model))
    measured = partial(
        measure,
        model,
        tokenizer,
        rows,
        encoded,
        samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seeing=seeing,
    )
    tuned = measured(on_progress=named("tuned", on_progress))
    with disabled(model):
        base = measured(on_progress=named("base", on_progress))
    prompts = [tokenizer.decode(list(s.prompt), skip_special_tokens=True) for s in samples]
    return Comparison(base, tuned, samples, tuple(str(p).strip() for p in prompts))


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    encoded: Sequence[EncodedRow],
    *,
    generate_rows: int = 32,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seeing: Seeing | None = None,
    on_progress: Stage | None = None,
) -> Evaluation:
    """Measure the model as it is; the arguments and errors are those of `compare`."""
    samples = choose_samples(rows, encoded, generate_rows, context_length(model))
    return measure(
        model,
        tokenizer,
        rows,
        encoded,
        samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seeing=seeing,
        on_progress=on_progress,
    )


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    encoded: Sequence[EncodedRow],
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int,
    seeing: Seeing | None,
    on_progress: Stage | None,
) -> Evaluation:
    """Return every row's loss, and the samples' generated texts and scores."""

    measured = losses(
        model,
        encoded,
        batch_size,
        lines=rows.lines,
        join=joining(seeing),
        on_progress=staged("held-out loss", on_progress),
    )
    texts: list[str] = []
    if samples:
        texts = generate(
            model,
            tokenizer,
            [sample.prompt for sample in samples],
            max_new_tokens,
            batch_size,
            fill=None if seeing is None else seeing.filling(encoded, samples),
            on_progress=staged("generating", on_progress),
        )
    references = [sample.reference for sample in samples]
    scores = {
        name: tuple(metric(text, ref) for text, ref in zip(texts, references, strict=True))
        for name, metric in (metrics_for(references).items() if samples else ())
    }
    return Evaluation(tuple(measured), tuple(texts), scores)


def staged(what: str, on_progress: Stage | None) -> Progress | None:
    """Say what the rows are being counted for."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(what, done, total)


def named(who: str, on_progress: Stage | None) -> Stage | None:
    """Say which model a stage is about."""
    if on_progress is None:
        return None
    return lambda what, done, total: on_progress(f"{who}: {what}", done, total)


def check_same_rows(rows: Rows, encoded: Sequence[EncodedRow]) -> None:
    """Raise where the rows and their tokens are not the same rows, or none."""
    if not encoded or not len(encoded) == len(rows.rows) == len(rows.lines):
        raise DataError(
            f"there are {len(rows.rows)} held-out rows and {len(encoded)} of them as tokens; "
            f"expected the same number, at least one: give more rows or another split"
        )


def choose_samples(
    rows: Rows, encoded: Sequence[EncodedRow], count: int, room: int | None = None
) -> tuple[Sample, ...]:
    """Return up to `count` rows that have a prompt and a completion, spread evenly over all.

    With `room`, only prompts of fewer tokens.
    """
    check_same_rows(rows, encoded)
    possible = [
        sample
        for number in range(len(encoded))
        if (sample := as_sample(rows, encoded[number], number)) is not None
        and (room is None or len(sample.prompt) < room)
    ]
    places = np.linspace(0, len(possible) - 1, min(count, len(possible))).round().astype(int)
    return tuple(possible[place] for place in places.tolist())


def as_sample(rows: Rows, encoded: EncodedRow, number: int) -> Sample | None:
    """Return a row's prompt, token for token as in training, and its reference; None for text."""
    row = rows.rows[number]
    reference, start = own_completion(row, encoded), completion_start(encoded)
    if reference is None or start == 0:
        return None
    prompt = tuple(encoded.input_ids[:start])
    pictures = tuple(row.get("images", ()))
    return Sample(number, rows.lines[number], prompt, reference.strip(), pictures)


def completion_start(row: EncodedRow) -> int:
    """Return where the last stretch of trained tokens begins."""
    start = max((i + 1 for i, trained in enumerate(row.trained) if trained), default=0)
    while start > 0 and row.trained[start - 1]:
        start -= 1
    return start


def own_completion(row: Mapping[str, Any], encoded: EncodedRow) -> str | None:
    """Return the last completion of which tokens are left, whole even where some were cut.

    Of messages it is the assistant's last, or an earlier one where the last ones were cut off.
    """
    if "completion" in row:
        return row["completion"]
    said = [turn["content"] for turn in row.get("messages", ()) if turn["role"] == "assistant"]
    starts = sum(trained and not before for before, trained in pairwise([False, *encoded.trained]))
    return said[min(starts, len(said)) - 1] if said else None


def loss_records(comparison: Comparison) -> list[MetricComparison]:
    """Return the records of loss and of perplexity, which share one paired test."""
    base, tuned = comparison.base, comparison.tuned
    weights = [float(r.tokens) for r in base.losses]
    per_row = [[r.per_token for r in side.losses] for side in (base, tuned)]
    test = paired_test(*per_row, weights=weights)
    sides = [bootstrap_interval(values, weights=weights, level=LEVEL) for values in per_row]
    grown = [i and (exponential(i[0]), exponential(i[1])) for i in sides]
    change = tuned.perplexity - base.perplexity
    return [
        metric_record("loss", "lower", (base.loss, tuned.loss), sides, test),
        metric_record(
            "perplexity", "lower", (base.perplexity, tuned.perplexity), grown, test, change
        ),
    ]


def score_records(comparison: Comparison) -> list[MetricComparison]:
    """Return the records of the metrics of the generated text."""
    base, tuned = comparison.base.scores, comparison.tuned.scores
    return [compared_means(name, "higher", base[name], tuned[name]) for name in base]


def exponential(value: float) -> float:
    """Return exp(value), infinity where it overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
