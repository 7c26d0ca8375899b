"""How often a reward model gives the better answer more: base, tuned, and a coin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from inlay.errors import DataError
from inlay.evaluate.comparison import UNTRAINED, Stage, named, softplus
from inlay.evaluate.outputs import outputs
from inlay.evaluate.record import ComparisonRecord, MetricComparison, compared_means
from inlay.evaluate.statistics import LEVEL
from inlay.model.adapters.attach import disabled
from inlay.tasks.reward.pairs import RewardPair

COIN = "a coin: every answer the same reward, half of the pairs right"


def margins(
    model: nn.Module,
    pairs: Sequence[RewardPair],
    batch_size: int,
    *,
    lines: Sequence[int] | None = None,
    on_progress: Stage | None = None,
) -> list[float]:
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    twice = None if lines is None else [*lines, *lines]
    told = on_progress and (lambda done, total: on_progress("rewards", done, total))
    found = outputs(model, rows, batch_size, lines=twice, on_progress=told)
    sides = found[: len(pairs)], found[len(pairs) :]
    return [reward(a) - reward(b) for a, b in zip(*sides, strict=True)]


def reward(output: Tensor) -> float:
    return float(output.squeeze())


def means(found: Sequence[float]) -> dict[str, float]:
    """Return loss, accuracy and margin of pairs, as TRL's RewardTrainer defines them."""
    count = len(found)
    return {
        "loss": sum(softplus(-margin) for margin in found) / count,
        "reward_accuracy": sum(margin > 0 for margin in found) / count,
        "reward_margin": sum(found) / count,
    }


def held_out_rewards(
    model: nn.Module, pairs: Sequence[RewardPair], batch_size: int
) -> dict[str, float]:
    return means(margins(model, pairs, batch_size))


def compare_rewards(
    model: nn.Module,
    pairs: Sequence[RewardPair],
    *,
    lines: Sequence[int] | None = None,
    batch_size: int = 8,
    on_progress: Stage | None = None,
) -> ComparisonRecord:
    """Measure the model with its active adapters, without, and a coin on the same pairs.

    `accuracy` is the share of pairs whose preferred answer gets more, `margin` by how much, `loss`
    is -log sigmoid(margin) in nats a pair (ln 2 for the coin).

    Args:
        model: a model of one number a row with an adapter on it.
        pairs: the held-out pairs as tokens.
        lines: the pairs' lines in their file, for error messages.
        batch_size: rows in one forward pass.
        on_progress: called as the work goes on.
    """
    if not pairs:
        raise DataError("there are no held-out pairs; give more rows or another split")
    told: dict[str, Any] = {"lines": lines, "batch_size": batch_size}
    tuned = margins(model, pairs, **told, on_progress=named("tuned", on_progress))
    with disabled(model):
        base = margins(model, pairs, **told, on_progress=named("base", on_progress))
    return {
        "rows": len(pairs),
        "tokens": sum(len(p.chosen.input_ids) + len(p.rejected.input_ids) for p in pairs),
        "counted": "tokens",
        "generated_rows": 0,
        "level": LEVEL,
        "metrics": reward_records(right(base), base, tuned),
        "examples": [],
        "note": UNTRAINED,
        "baseline": {
            "about": COIN,
            "metrics": reward_records([0.5] * len(pairs), [0.0] * len(pairs), tuned),
        },
    }


def right(found: Sequence[float]) -> list[float]:
    """Return 1 for each pair whose preferred answer gets more, and 0 for the others."""
    return [float(margin > 0) for margin in found]


def reward_records(
    hits: Sequence[float], before: Sequence[float], tuned: Sequence[float]
) -> list[MetricComparison]:
    """Return accuracy, margin and loss of both, each with the paired test of the difference."""
    losses = [[softplus(-margin) for margin in side] for side in (before, tuned)]
    return [
        compared_means("accuracy", "higher", hits, right(tuned)),
        compared_means("margin", "higher", before, tuned),
        compared_means("loss", "lower", *losses),
    ]
