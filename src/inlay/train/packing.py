"""Whether several rows may share a sequence: tried on the model itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.evaluate.losses import EncodedRow
from inlay.methods.base import evaluating

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
LOW_PRECISION_TOLERANCE = 0.05
LONGEST = 64
"""Tokens of each of the two rows that are tried."""


def check_packing(model: nn.Module, rows: Sequence[EncodedRow]) -> None:
    """Raise unless a row's logits are the same alone and behind another row in one sequence.

    Raises:
        UsageError: they differ, as they do where attention crosses from row to row.
    """
    if len(rows) < 2:
        return
    device = next(model.parameters()).device
    first, second = (torch.tensor([[*row.input_ids[:LONGEST]]], device=device) for row in rows[:2])
    with evaluating(model), torch.no_grad():
        alone = logits(model, second, positions(second))
        both = torch.cat([positions(first), positions(second)], dim=1)
        packed = logits(model, torch.cat([first, second], dim=1), both)[:, first.shape[1] :]
    difference = float((packed - alone).abs().max() / alone.abs().max())
    allowed = TOLERANCE.get(alone.dtype, LOW_PRECISION_TOLERANCE)
    if not difference <= allowed:
        raise UsageError(
            f"'packing' would mix rows: in one sequence with another row a row's logits change by "
            f"{difference:.1%} with this model, attention and method, and must not change; leave "
            "packing off"
        )


def positions(ids: Tensor) -> Tensor:
    """Return the positions 0, 1, 2, ... of a row's tokens."""
    return torch.arange(ids.shape[1], device=ids.device)[None]


def logits(model: nn.Module, ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the logits of a sequence without padding, whose rows begin at position 0."""
    return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
