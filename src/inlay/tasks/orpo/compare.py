"""The odds of the preferred answer against the other's: base against tuned on the same pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

from torch import nn
from transformers import PreTrainedTokenizerBase

from inlay.data.rows import Rows
from inlay.evaluate.comparison import Limits, softplus, with_records
from inlay.evaluate.losses import Join, RowLoss, losses
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.supervised import both_losses, compare
from inlay.tasks.dpo.compare import LogProbs, preference_records
from inlay.tasks.dpo.pairs import Pair


@dataclass(frozen=True)
class OddsRatios:
    """A model's log-probabilities of two answers a token, and its loss of the preferred row."""

    model: Sequence[LogProbs]
    """The mean over each answer's tokens."""
    nll: Sequence[float]
    """Of prompt and preferred answer, in nats a token."""
    beta: float

    @property
    def losses(self) -> list[float]:
        """ORPO's loss of each pair: nll - beta * log sigmoid(log odds ratio)."""
        pairs = zip(self.nll, self.model, strict=True)
        return [nll + self.beta * softplus(-log_odds_ratio(pair)) for nll, pair in pairs]

    def means(self) -> dict[str, float]:
        """Return the loss, how often the preferred answer is likelier a token, and the log odds."""
        count = len(self.model)
        return {
            "loss": sum(self.losses) / count,
            "accuracy": sum(pair.margin > 0 for pair in self.model) / count,
            "log_odds": sum(map(log_odds_ratio, self.model)) / count,
        }


def log_odds_ratio(pair: LogProbs) -> float:
    """Return log(odds of the chosen answer / odds of the rejected), odds = p / (1 - p).

    >>> round(math.exp(log_odds_ratio(LogProbs(math.log(0.8), math.log(0.5)))), 6)
    4.0
    """
    return pair.margin - log1mexp(pair.chosen) + log1mexp(pair.rejected)


def log1mexp(x: float) -> float:
    """Return log(1 - exp(x)) for x < 0 without cancellation; minus infinity at 0."""
    if x >= 0:
        return -math.inf
    return math.log1p(-math.exp(x)) if x < -math.log(2) else math.log(-math.expm1(x))


def odds_ratios(
    model: nn.Module,
    pairs: Sequence[Pair],
    batch_size: int,
    beta: float,
    *,
    join: Join | None = None,
) -> OddsRatios:
    """Return what the model gives both answers of each pair; the errors are those of `losses`."""
    sides = (
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
        [pair.whole for pair in pairs],
    )
    chosen, rejected, rows = (losses(model, side, batch_size, join=join) for side in sides)
    return judged(chosen, rejected, rows, beta)


def judged(
    chosen: Sequence[RowLoss], rejected: Sequence[RowLoss], rows: Sequence[RowLoss], beta: float
) -> OddsRatios:
    pairs = zip(chosen, rejected, strict=True)
    found = [LogProbs(-one.per_token, -other.per_token) for one, other in pairs]
    return OddsRatios(found, [row.per_token for row in rows], beta)


def compare_odds(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Rows,
    pairs: Sequence[Pair],
    *,
    beta: float,
    **limits: Unpack[Limits],
) -> ComparisonRecord:
    """Measure the model with its active adapters, and without, on the same pairs.

    `accuracy` is the share of pairs whose preferred answer is the likelier one a token, `margin`
    by how many nats a token, `loss` ORPO's. Arguments, errors and the rest are those of
    `compare_pairs`; `beta` weighs the odds ratio (the paper's lambda, arXiv 2403.07691).
    """
    answers = compare(model, tokenizer, chosen, [pair.chosen for pair in pairs], **limits)
    rejected = both_losses(model, [pair.rejected for pair in pairs], chosen.lines, limits)
    rows = both_losses(model, [pair.whole for pair in pairs], chosen.lines, limits)
    both = [
        judged(side.losses, other, row, beta)
        for side, other, row in zip((answers.base, answers.tuned), rejected, rows, strict=True)
    ]
    records = preference_records([own.model for own in both], [own.losses for own in both])
    return with_records(records, answers.to_dict(), "chosen")
