"""Bottleneck adapters: h' = h + s W_u f(W_d h)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.errors import AdapterError
from inlay.methods.base import (
    HiddenMethod,
    Params,
    Targets,
    checked_positive,
    kaiming_uniform,
    zeros,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
PLACES = {"houlsby": "residual", "pfeiffer": "mlp-out", "parallel": "mlp-block"}
"""Variant -> its default group of layers, in model/adapters/targets.py."""


@dataclass(frozen=True, kw_only=True)
class Bottleneck(HiddenMethod):
    """A small two-layer network beside a layer's output: `h' = h + scale W_u f(W_d h)`.

    `houlsby` follows the attention output and the feed-forward output, `pfeiffer` only the latter,
    `parallel` runs beside the whole feed-forward block and reads its input x in place of h.
    Shapes: W_d (size, width), W_u (out, size), and with `biases` (size,) and (out,), where width
    is out, or in for `parallel`; `size` is `width // reduction` unless given.
    size (width + out) + size + out parameters a place. W_u starts at zero, so attaching is a no-op.
    Papers: arXiv 1902.00751 (Houlsby), 2005.00052 (Pfeiffer), 2110.04366 (parallel).

    Raises:
        AdapterError: an unknown variant or activation; reduction, size or scale not positive.

    >>> Bottleneck(reduction=8).count((64, 256))
    1096
    """

    variant: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    reduction: int = 16
    size: int | None = None
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    scale: float = 1.0
    biases: bool = True

    name = "bottleneck"
    paper = "1902.00751"

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.variant, PLACES, "variant"),
            (self.activation, ACTIVATIONS, "activation"),
        ):
            if value not in known:
                raise AdapterError(f"{what} must be one of {', '.join(known)}, not {value!r}")
        checked_positive(self.reduction, "reduction")
        checked_positive(self.scale, "scale")
        if self.size is not None:
            checked_positive(self.size, "size")

    @property
    def own_targets(self) -> Targets:
        return PLACES[self.variant]

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("linear", "conv1d", "block")

    def widths(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the width that is read and the bottleneck's size, for a shape (out, in)."""
        width = shape[1] if self.variant == "parallel" else shape[0]
        return width, self.size or max(1, width // self.reduction)

    def init(self, shape: tuple[int, int], like: Tensor, seed: torch.Generator) -> Params:
        width, size = self.widths(shape)
        trained = {
            "down": kaiming_uniform(like, size, width, seed),
            "up": zeros(like, shape[0], size),
        }
        if self.biases:
            trained |= {"down_bias": zeros(like, size), "up_bias": zeros(like, shape[0])}
        return Params(trained)

    def count(self, shape: tuple[int, int]) -> int:
        width, size = self.widths(shape)
        return size * (width + shape[0]) + (size + shape[0] if self.biases else 0)

    def hidden(self, p: Params, x: Tensor, h: Tensor, training: bool) -> Tensor:
        read = x if self.variant == "parallel" else h
        down_bias = p.down_bias.to(h.dtype) if self.biases else None
        up_bias = p.up_bias.to(h.dtype) if self.biases else None
        inner = ACTIVATIONS[self.activation](F.linear(read, p.down.to(h.dtype), down_bias))
        return h + self.scale * F.linear(inner, p.up.to(h.dtype), up_bias)
