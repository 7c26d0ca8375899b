"""Products with a frozen weight that is held in a packed format.

The weight is dequantised inside an opaque operator, for the product alone. The gradient of
`frozen_linear` is the *other* operator, `frozen_linear_t`: a compiler that saw one operator
twice would merge the two dequantisations and keep the dense weight for the backward pass.
What is saved is the packed parts, which the model holds anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Dequantize = Callable[[Sequence[Tensor], int, int, torch.dtype], Tensor]
"""`(parts, out, in, dtype)` -> the dense (out, in) matrix in `dtype`."""

FORMATS: dict[str, Dequantize] = {}
"""Format name -> how its packed parts become a dense matrix."""


def register_format(name: str, dequantize: Dequantize) -> None:
    """Make a packed format known to the operators under `name`."""
    FORMATS[name] = dequantize


@torch.library.custom_op("inlay::frozen_linear", mutates_args=())
def frozen_linear(
    x: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int
) -> Tensor:
    """`x @ W.T`; x: (*b, in) -> (*b, out), in x's dtype; `rows` is out, `columns` is in."""
    return F.linear(x, FORMATS[packing](parts, rows, columns, x.dtype))


@torch.library.custom_op("inlay::frozen_linear_t", mutates_args=())
def frozen_linear_t(
    g: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int
) -> Tensor:
    """`g @ W`; g: (*b, out) -> (*b, in), in g's dtype; `rows` is out, `columns` is in."""
    return g @ FORMATS[packing](parts, rows, columns, g.dtype)


@frozen_linear.register_fake
def _(x: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@frozen_linear_t.register_fake
def _(g: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int) -> Tensor:
    return g.new_empty(*g.shape[:-1], columns)


def keep_parts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep for the backward pass what the model holds anyway: the packed parts."""
    del output
    _, parts, ctx.packing, ctx.rows, ctx.columns = inputs
    ctx.save_for_backward(*parts)


def gradient_by(
    other: Callable[..., Tensor],
) -> Callable[[Any, Tensor], tuple[Tensor, list[None], None, None, None]]:
    """Return the backward of one product: the other product, on the packed parts."""

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, list[None], None, None, None]:
        parts = list(ctx.saved_tensors)
        gradient = other(g, parts, ctx.packing, ctx.rows, ctx.columns)
        return gradient, [None] * len(parts), None, None, None

    return backward


frozen_linear.register_autograd(gradient_by(frozen_linear_t), setup_context=keep_parts)
frozen_linear_t.register_autograd(gradient_by(frozen_linear), setup_context=keep_parts)
