"""How well a model tells desirable answers from others: base against tuned on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, Unpack

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from inlay.data.rows import Rows
from inlay.errors import DataError
from inlay.evaluate.comparison import Limits, with_records
from inlay.evaluate.losses import EncodedRow, Join, RowLoss, losses
from inlay.evaluate.record import ComparisonRecord, MetricComparison, compared_means, metric_record
from inlay.evaluate.statistics import (
    Separation,
    auc,
    compare_groups,
    difference_of_means,
    ranks,
)
from inlay.evaluate.supervised import both_losses, compare
from inlay.tasks.kto.rows import Labelled

T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """How much a row of each label weighs in the loss."""

    desirable: float = 1.0
    undesirable: float = 1.0


@dataclass(frozen=True)
class LabelledLosses:
    """A model's loss on each answer, and on answers that stand behind another row's prompt."""

    answers: Sequence[RowLoss]
    mismatched: Sequence[RowLoss]


def labelled_losses(
    model: nn.Module,
    rows: Sequence[Labelled],
    mismatched: Sequence[EncodedRow],
    batch_size: int = 8,
    *,
    join: Join | None = None,
) -> LabelledLosses:
    """Return the loss of every answer; raises what `losses` raises."""
    return LabelledLosses(
        losses(model, [row.answer for row in rows], batch_size, join=join),
        losses(model, mismatched, batch_size, join=join),
    )


@dataclass(frozen=True)
class Judgements:
    """A model's log-probabilities of labelled answers, seen from a reference's."""

    model: LabelledLosses
    reference: LabelledLosses
    desirable: Sequence[bool]
    beta: float
    weights: Weights

    @property
    def kl(self) -> float:
        """The model's mean log-ratio to its reference on mismatched answers."""
        found = log_ratios(self.model.mismatched, self.reference.mismatched)
        return max(mean(found), 0.0) if found else 0.0

    @property
    def rewards(self) -> list[float]:
        """beta * log(p / p of the reference), of each answer."""
        ratios = log_ratios(self.model.answers, self.reference.answers)
        return [self.beta * ratio for ratio in ratios]

    @property
    def losses(self) -> list[float]:
        """KTO's loss of each row: weight * (1 - sigmoid(+-(reward - beta * kl)))."""
        start, weights = self.beta * self.kl, self.weights
        return [
            weights.desirable * sigmoid(start - reward)
            if desirable
            else weights.undesirable * sigmoid(reward - start)
            for reward, desirable in zip(self.rewards, self.desirable, strict=True)
        ]

    @property
    def per_token(self) -> list[float]:
        """The log-probability per token of each answer, comparable between lengths."""
        return [-row.per_token for row in self.model.answers]

    def means(self) -> dict[str, float]:
        """Return the loss, the KL, each label's reward and, of both, margin and AUC."""
        good, bad = parted(self.rewards, self.desirable)
        found = {"loss": mean(self.losses), "kl": self.kl}
        found |= {"reward_desirable": mean(good)} if good else {}
        found |= {"reward_undesirable": mean(bad)} if bad else {}
        if good and bad:
            found |= {
                "reward_margin": mean(good) - mean(bad),
                "reward_auc": float(auc(np.asarray(good), np.asarray(bad))),
            }
        return found


def log_ratios(model: Sequence[RowLoss], reference: Sequence[RowLoss]) -> list[float]:
    """Return log(p / p of the reference) of each row, in nats."""
    return [theirs.nll - own.nll for own, theirs in zip(model, reference, strict=True)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def parted(values: Sequence[T], desirable: Sequence[bool]) -> tuple[list[T], list[T]]:
    both = list(zip(values, desirable, strict=True))
    return [value for value, label in both if label], [value for value, label in both if not label]


def compare_labelled(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    desirable: Rows,
    encoded: Sequence[Labelled],
    mismatched: Sequence[EncodedRow],
    *,
    beta: float,
    weights: Weights,
    **limits: Unpack[Limits],
) -> ComparisonRecord:
    """Measure the model with its active adapters, and without, on the same labelled rows.

    `auc` is the chance that of a desirable and another answer the desirable one is the likelier a
    token, `reward_margin` by how much more its reward rises from the base's, `loss` KTO's with the
    base as its reference (arXiv 2402.01306). Then the mean reward of either label and, as of
    supervised rows, the loss of the desirable answers and the text that is generated against them.

    Args:
        model: a causal language model with an adapter on it.
        tokenizer: the model's tokenizer.
        rows: the held-out rows.
        desirable: those of them with a desirable answer, as supervised rows.
        encoded: all rows as tokens, one for one.
        mismatched: their prompts with other rows' answers, which the KL is estimated from.
        beta: how near the run held the model to the base.
        weights: how much a row of each label weighs in the loss.
        limits: how much is generated, and at a time; as for `compare`.
    """
    labels = [row.desirable for row in encoded]
    check_both(labels)
    good, bad = parted([row.answer for row in encoded], labels)
    answers = compare(model, tokenizer, desirable, good, **limits)
    _, lines = parted(rows.lines, labels)
    others = both_losses(model, bad, lines, limits)
    drift = both_losses(model, mismatched, rows.lines, limits)
    base, tuned = (
        LabelledLosses(rejoined(side.losses, other, labels), kl)
        for side, other, kl in zip((answers.base, answers.tuned), others, drift, strict=True)
    )
    seen = [Judgements(side, base, labels, beta, weights) for side in (base, tuned)]
    found = with_records(labelled_records(*seen), answers.to_dict(), "desirable")
    tokens = sum(row.tokens for row in base.answers)
    return {**found, "rows": len(encoded), "tokens": tokens}


def check_both(labels: Sequence[bool]) -> None:
    if len(set(labels)) != 2:
        raise DataError(
            f"there are {labels.count(True)} desirable rows and {labels.count(False)} others to "
            "compare base and tuned on; expected some of both: give more rows or another split"
        )


def rejoined(good: Sequence[T], bad: Sequence[T], desirable: Sequence[bool]) -> list[T]:
    firsts, seconds = iter(good), iter(bad)
    return [next(firsts) if label else next(seconds) for label in desirable]


def labelled_records(base: Judgements, tuned: Judgements) -> list[MetricComparison]:
    """Return AUC, margin, loss and rewards of both, each with the paired test of the difference."""
    labels = base.desirable
    rewards = [parted(side.rewards, labels) for side in (base, tuned)]
    return [
        separated("auc", auc, ranks(base.per_token), ranks(tuned.per_token), labels),
        separated("reward_margin", difference_of_means, base.rewards, tuned.rewards, labels),
        compared_means("loss", "lower", base.losses, tuned.losses),
        compared_means("desirable_reward", "higher", *(good for good, _ in rewards)),
        compared_means("undesirable_reward", "lower", *(bad for _, bad in rewards)),
    ]


def separated(
    name: str,
    statistic: Separation,
    base: Sequence[float],
    tuned: Sequence[float],
    labels: Sequence[bool],
) -> MetricComparison:
    test, sides = compare_groups(base, tuned, labels, statistic)
    good, bad = parted(base, labels)
    start = float(statistic(np.asarray(good), np.asarray(bad)))
    return metric_record(name, "higher", (start, start + test.mean_difference), sides, test)
