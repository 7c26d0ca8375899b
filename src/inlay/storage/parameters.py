"""Parameters that no layer holds: a mixture's experts in one tensor, an attention's projections.

A parameter (out, in) is a matrix; one of three dimensions is a stack of them, (stack, out, in), or
(stack, in, out) where the module says `is_transposed`, as HF PEFT reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.storage.own import ByWeight, holds_floats

JOINED = "in_proj_weight"
APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The parameters of `nn.MultiheadAttention`'s projections: one, or three where keys and values have
other widths."""


class Parameter(ByWeight):
    """One parameter of a module: a matrix, or a stack of matrices."""

    def __init__(self, layer: nn.Module, parameter: str) -> None:
        super().__init__(layer, parameter, bias_of(layer, parameter))
        lies = stored_shape(layer, parameter)
        self.stack = lies[0] if len(lies) == 3 else None
        self.transposed = len(lies) == 3 and bool(getattr(layer, "is_transposed", False))

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.matrix().shape[-2:]
        return out, width

    def turned(self, w: Tensor) -> Tensor:
        return w.transpose(-1, -2) if self.transposed else w

    def each(self) -> list[Member]:
        return [Member(self, i) for i in range(self.stack or 0)]


class Member(ByWeight):
    """One matrix of a stack."""

    def __init__(self, whole: Parameter, index: int) -> None:
        super().__init__(whole.layer, whole.parameter, whole.bias_name)
        self.whole, self.index = whole, index

    def matrix(self) -> Tensor:
        return self.whole.matrix()[self.index]

    @property
    def bias(self) -> Tensor | None:
        every = self.whole.bias
        return None if every is None else every[self.index]

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype


def stored_shape(layer: nn.Module, parameter: str) -> torch.Size:
    held = layer._parameters[parameter]
    assert held is not None
    return held.shape


def bias_of(layer: nn.Module, parameter: str) -> str | None:
    if isinstance(layer, nn.MultiheadAttention):
        return "in_proj_bias" if parameter == JOINED else None
    name = f"{parameter}_bias"
    return name if name in layer._parameters else None


def projections(attention: nn.MultiheadAttention) -> tuple[str, ...]:
    held = (n for n in (JOINED, *APART) if holds_floats(attention, n))
    return tuple(held)


def is_expert_stack(module: nn.Module, parameter: str) -> bool:
    held: Any = module._parameters.get(parameter)
    return holds_floats(module, parameter) and held.ndim == 3 and min(held.shape) > 1
