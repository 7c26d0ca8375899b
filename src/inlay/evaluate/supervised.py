"""Base against tuned on the same rows: losses, generated text, uncertainty, a paired test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PreTrainedTokenizerBase

from inlay.data.rows import Rows
from inlay.evaluate.comparison import Limits, Stage, exponential, named, staged
from inlay.evaluate.generation import context_length, generate
from inlay.evaluate.images import Seeing, joining, thumbnail
from inlay.evaluate.losses import EncodedRow, RowLoss, losses
from inlay.evaluate.metrics import metrics_for
from inlay.evaluate.record import (
    ComparisonRecord,
    ExampleRecord,
    MetricComparison,
    compared_means,
    metric_record,
)
from inlay.evaluate.samples import Sample, choose_samples
from inlay.evaluate.statistics import (
    LEVEL,
    bootstrap_interval,
    paired_test,
    weighted_mean,
)
from inlay.model.adapters.attach import disabled

__all__ = ["Comparison", "Evaluation", "compare", "evaluate", "generate", "losses"]

EXAMPLES = 3


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


def loss_records(comparison: Comparison) -> list[MetricComparison]:
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
    base, tuned = comparison.base.scores, comparison.tuned.scores
    return [compared_means(name, "higher", base[name], tuned[name]) for name in base]


def both_losses(
    model: nn.Module, rows: Sequence[EncodedRow], lines: Sequence[int], limits: Limits
) -> tuple[list[RowLoss], list[RowLoss]]:
    size, join = limits.get("batch_size", 8), joining(limits.get("seeing"))
    tuned = losses(model, rows, size, lines=lines, join=join)
    with disabled(model):
        return losses(model, rows, size, lines=lines, join=join), tuned
