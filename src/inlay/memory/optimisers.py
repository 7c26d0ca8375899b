"""Optimisers on fake tensors: their state, and what an update allocates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Optimiser = Callable[[Sequence[Tensor]], Callable[[], Any]]
"""Creates the state for parameters that have a gradient; returns the update."""


def adamw(parameters: Sequence[Tensor], *, foreach: bool = False) -> Callable[[], Any]:
    """PyTorch's AdamW: two moments of the parameter's size each."""
    made = torch.optim.AdamW(parameters, foreach=foreach)
    made.step()
    return made.step


EIGHT_BIT_BLOCK = 256
SMALLEST_IN_EIGHT_BIT = 4096
"""bitsandbytes keeps the moments of smaller parameters in 32 bits."""


def adamw_8bit(parameters: Sequence[Tensor]) -> Callable[[], Any]:
    """bitsandbytes' AdamW: two moments of a byte each, with a scale for every 256."""
    state = [moment for p in parameters for moment in eight_bit_moments(p)]

    def step() -> list[Tensor]:
        return state

    return step


def eight_bit_moments(p: Tensor) -> list[Tensor]:
    if p.numel() < SMALLEST_IN_EIGHT_BIT:
        return [torch.empty_like(p, dtype=torch.float32) for _ in range(2)]
    blocks = -(-p.numel() // EIGHT_BIT_BLOCK)
    return [
        part
        for _ in range(2)
        for part in (torch.empty_like(p, dtype=torch.uint8), p.new_empty(blocks))
    ]
