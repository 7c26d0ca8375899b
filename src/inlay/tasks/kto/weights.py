"""How much a desirable row weighs beside an undesirable one in KTO's loss."""

from __future__ import annotations

from inlay.tasks.kto import KtoConfig
from inlay.tasks.kto.compare import Weights

LEAST, MOST = 1.0, 4 / 3
"""How the desirable rows' weight in all should stand to the others' (arXiv 2402.01306, eq. 8)."""


def weights_of(config: KtoConfig, desirable: int, undesirable: int) -> Weights:
    """Return the weights that the run gives; those left at auto bring the balance into its range.

    (weight * desirable rows) / (weight * undesirable rows) lies from 1 to 4/3. Of two weights at
    auto, the one that must be raised is, and the other is 1.

    Args:
        config: the run.
        desirable: how many rows are desirable.
        undesirable: how many are not.
    """
    mine, theirs = config.desirable_weight, config.undesirable_weight
    ratio = desirable / undesirable
    if isinstance(theirs, float) and not isinstance(mine, float):
        return Weights(nearest_to_one(LEAST * theirs / ratio, MOST * theirs / ratio), theirs)
    if not isinstance(theirs, float):
        given = mine if isinstance(mine, float) else nearest_to_one(LEAST / ratio, float("inf"))
        return Weights(given, nearest_to_one(given * ratio / MOST, given * ratio / LEAST))
    assert isinstance(mine, float)
    return Weights(mine, theirs)


def nearest_to_one(low: float, high: float) -> float:
    return min(max(1.0, low), high)


def advised(weights: Weights, desirable: int, undesirable: int) -> str:
    """Return a sentence on the balance of both labels, and whether it is the advised one."""
    balance = weights.desirable * desirable / (weights.undesirable * undesirable)
    inside = LEAST - 1e-9 <= balance <= MOST + 1e-9
    said = "within" if inside else "outside"
    return (
        f"{desirable} desirable rows weigh {weights.desirable:.3g} each and {undesirable} "
        f"undesirable ones {weights.undesirable:.3g}: {balance:.3g} to 1 in all, {said} the 1 to "
        "4/3 that the paper advises"
    )
