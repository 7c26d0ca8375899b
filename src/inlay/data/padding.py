"""Rows of different lengths under one another, filled to one length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def pad(rows: Sequence[Sequence[int]], value: int, multiple: int = 1, *, width: int = 0) -> Tensor:
    """Return rows (rows, longest) filled on the right with a value.

    The longest is rounded up to a multiple; `width` gives it instead.
    """
    width = width or rounded_up(max(map(len, rows)), multiple)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
