"""How often a model prefers the better answer: base against tuned on the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

from torch import nn
from transformers import PreTrainedTokenizerBase

from inlay.data.rows import Rows
from inlay.evaluate.comparison import Limits, softplus, with_records
from inlay.evaluate.losses import Join, RowLoss, losses
from inlay.evaluate.record import ComparisonRecord, MetricComparison, compared_means
from inlay.evaluate.supervised import both_losses, compare
from inlay.tasks.dpo.pairs import Pair

BETA = 0.1
"""How near a model is held to its base where nothing else is said, as in DPO's paper."""


@dataclass(frozen=True)
class LogProbs:
    """The log-probability of each of two answers, in nats."""

    chosen: float
    rejected: float

    @property
    def margin(self) -> float:
        """log p(chosen) - log p(rejected), in nats."""
        return self.chosen - self.rejected


def log_probs(
    model: nn.Module,
    pairs: Sequence[Pair],
    batch_size: int = 8,
    *,
    lines: Sequence[int] | None = None,
    join: Join | None = None,
) -> list[LogProbs]:
    """Return the log-probabilities of both answers of each pair; raises what `losses` raises."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    twice = None if lines is None else [*lines, *lines]
    found = losses(model, rows, batch_size, lines=twice, join=join)
    return joined(found[: len(pairs)], found[len(pairs) :])


def joined(chosen: Sequence[RowLoss], rejected: Sequence[RowLoss]) -> list[LogProbs]:
    return [LogProbs(-a.nll, -b.nll) for a, b in zip(chosen, rejected, strict=True)]


@dataclass(frozen=True)
class Preferences:
    """A model's log-probabilities on pairs, seen from a reference's."""

    model: Sequence[LogProbs]
    reference: Sequence[LogProbs]
    beta: float

    @property
    def margins(self) -> list[float]:
        """log p(chosen) - log p(rejected) of the model, less the reference's, in nats."""
        pairs = zip(self.model, self.reference, strict=True)
        return [own.margin - reference.margin for own, reference in pairs]

    @property
    def losses(self) -> list[float]:
        """DPO's loss of each pair: -log sigmoid(beta * margin)."""
        return [softplus(-self.beta * margin) for margin in self.margins]

    def means(self) -> dict[str, float]:
        """Return the loss, and the reward's accuracy and margin as TRL defines them."""
        count = len(self.model)
        return {
            "loss": sum(self.losses) / count,
            "reward_accuracy": sum(margin > 0 for margin in self.margins) / count,
            "reward_margin": self.beta * sum(self.margins) / count,
        }


def compare_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Rows,
    pairs: Sequence[Pair],
    *,
    beta: float,
    **limits: Unpack[Limits],
) -> ComparisonRecord:
    """Measure the model with its active adapters, and without, on the same pairs.

    `accuracy` is the share of pairs whose preferred answer is the likelier one, `margin` by how
    many nats it is, `loss` DPO's with the base as its reference. Then, as of supervised rows, the
    loss of the preferred answers, and the text that is generated against them.

    Args:
        model: a causal language model with an adapter on it.
        tokenizer: the model's tokenizer.
        chosen: the held-out rows with the preferred answer as their completion.
        pairs: the same rows as tokens, one for one.
        beta: how near the run held the model to the base.
        limits: how much is generated, and at a time; as for `compare`.
    """
    answers = compare(model, tokenizer, chosen, [pair.chosen for pair in pairs], **limits)
    others = both_losses(model, [pair.rejected for pair in pairs], chosen.lines, limits)
    base, tuned = (
        joined(side.losses, other)
        for side, other in zip((answers.base, answers.tuned), others, strict=True)
    )
    both = [base, tuned]
    records = preference_records(both, [Preferences(own, base, beta).losses for own in both])
    return with_records(records, answers.to_dict(), "chosen")


def preference_records(
    models: Sequence[Sequence[LogProbs]], losses: Sequence[Sequence[float]]
) -> list[MetricComparison]:
    """Return accuracy, margin and loss of both, each with the paired test of the difference."""
    margins = [[pair.margin for pair in model] for model in models]
    return [
        compared_means("accuracy", "higher", *([float(m > 0) for m in own] for own in margins)),
        compared_means("margin", "higher", *margins),
        compared_means("loss", "lower", *losses),
    ]
