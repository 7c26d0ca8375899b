"""Multiply a model's frozen weights in 8 bits, behind a gate that measures what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from inlay.errors import ModelError
from inlay.model.adapters.wrappers import looks_through
from inlay.storage.registry import frozen, kind

ACCEPTED = 0.005
"""The largest accepted relative difference of the loss."""


@dataclass(frozen=True)
class Gate:
    """The loss on the same rows with products in the weights' dtype, and in 8 bits."""

    loss: float
    loss_in_8_bits: float

    @property
    def difference(self) -> float:
        return abs(self.loss_in_8_bits - self.loss) / abs(self.loss)

    @property
    def passed(self) -> bool:
        """Whether the difference is accepted; a loss that is not finite never is."""
        return self.difference <= ACCEPTED


@looks_through
def compute_in_8_bits(model: nn.Module, on: bool = True) -> nn.Module:
    """Multiply every frozen linear weight in 8 bits, both directions, or as it is held again.

    int8 on a CPU, FP8 on a GPU that has it; where neither is, products stay as they are. A CPU with
    AMX gains nothing: its bfloat16 tiles are faster than these int8 products. Weights
    stay as they are stored: each is quantised for the product alone, one scale a row, and
    activations and gradients too. A product differs by about 1%; measure what that does to the
    loss with `gate`.

    Raises:
        ModelError: the model has no frozen linear layer.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64)).requires_grad_(False)
    >>> compute_in_8_bits(model) is model
    True
    """
    layers = [m for m in model.modules() if kind(m) in ("linear", "conv1d")]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear layer that could be multiplied in 8 bits"
        )
    for layer in layers:
        held = getattr(frozen(layer), "layer", layer)
        vars(held)["computes_in_8_bits"] = on
    return model


@torch.no_grad()
def gate(model: nn.Module, loss: Callable[[], float]) -> Gate:
    """Measure a loss with and without 8-bit products; leave 8 bits on."""
    compute_in_8_bits(model, on=False)
    plain = loss()
    compute_in_8_bits(model)
    return Gate(plain, loss())
