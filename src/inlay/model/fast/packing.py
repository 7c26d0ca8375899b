"""Several rows packed into one sequence: positions restart at 0 where a row begins."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from inlay.errors import InlayError
from inlay.methods.base import evaluating

FULL = (torch.float32, torch.float64)
ALONE = {True: 1e-3, False: 0.05}
"""How far a row's logits may be from those it has alone, in full precision or less."""
CHANGED = {True: 1e-5, False: 0.01}
"""How far a row's logits may move when another row's tokens change: rounding of equal shapes."""
LONGEST = 64
"""Tokens of each of the two rows that are tried."""


def positions(lengths: Sequence[int]) -> Tensor:
    """Return (1, sum of lengths): 0, 1, 2, ... for each row of these lengths."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def segments(position_ids: Tensor) -> list[tuple[int, int]]:
    """Return where each row of one packed sequence begins and ends, from its positions (n)."""
    starts = (position_ids.diff() != 1).nonzero().flatten() + 1
    edges = [0, *starts.tolist(), len(position_ids)]
    return list(pairwise(edges))


def mixes_rows(model: nn.Module, rows: Sequence[Sequence[int]]) -> str | None:
    """Return why this model's rows cannot share a sequence, or None where they can.

    Tried on two different rows: a row's logits behind the other must be what they are alone, and
    must not move when the other's tokens change.
    """
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" not in accepted or "use_cache" not in accepted:
        return f"{type(model).__name__} takes no positions"
    first, *others = (list(row[:LONGEST]) for row in rows)
    second = next((row for row in others if row != first), None)
    if second is None:
        return None
    other = [second[i % len(second)] for i in range(len(first))]
    with evaluating(model), torch.no_grad():
        try:
            alone, packed, changed = (
                logits(model, [*before, second])[:, -len(second) :]
                for before in ([], [first], [other])
            )
        except (InlayError, RuntimeError, ValueError, IndexError) as error:
            return f"a sequence of two rows fails: {str(error).splitlines()[0]}"
    full = alone.dtype in FULL
    moved, off = furthest(changed, packed), furthest(packed, alone)
    if not moved <= CHANGED[full]:  # nor where it is no number
        return (
            f"in {type(model).__name__} a row sees the row before it in its sequence: its logits "
            f"change by {moved:.1%} when that row's words do"
        )
    if not off <= ALONE[full]:
        return (
            f"{type(model).__name__} does not begin a row anew behind another one: its logits "
            f"change by {off:.1%} against the row alone"
        )
    return None


def furthest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits (1, tokens, vocabulary) of rows packed into one sequence."""
    device = next(model.parameters()).device
    ids = torch.tensor([[token for row in rows for token in row]], device=device)
    where = positions([len(row) for row in rows]).to(device)
    return model(input_ids=ids, position_ids=where, use_cache=False).logits
