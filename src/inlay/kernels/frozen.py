"""Products with a frozen weight, however it is held.

The weight is unpacked inside an opaque operator, tile by tile, for the product alone. The gradient
of each operator is a *different* operator: a compiler that saw one operator twice would merge the
two unpackings and keep the dense weight for the backward pass. What is saved is the packed parts,
which the model holds anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from inlay.kernels.epilogue import Epilogue
from inlay.kernels.formats import dense
from inlay.kernels.matrix import matrix_of, product_scratch
from inlay.kernels.opaque import operator


@operator("frozen_linear", lowers=1, again=True)
def frozen_linear(
    x: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int
) -> Tensor:
    """`x @ W.T`; x: (*b, in) -> (*b, out), in x's dtype; `rows` is out, `columns` is in."""
    matrix = matrix_of(parts, packing, rows, columns, x)
    y = matrix.times(matrix.flat(x, columns), Epilogue(x.dtype))
    return y.view(*x.shape[:-1], rows)


@operator("frozen_linear_t", lowers=1, again=True)
def frozen_linear_t(
    g: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int
) -> Tensor:
    """`g @ W`; g: (*b, out) -> (*b, in), in g's dtype; `rows` is out, `columns` is in."""
    matrix = matrix_of(parts, packing, rows, columns, g)
    x = matrix.times_t(matrix.flat(g, rows), Epilogue(g.dtype))
    return x.view(*g.shape[:-1], columns)


@operator("biased_linear", lowers=1, again=True)
def biased_linear(
    x: Tensor, bias: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int
) -> Tensor:
    """`x @ W.T + bias`, the bias added before the sums are rounded; x: (*b, in) -> (*b, out)."""
    matrix = matrix_of(parts, packing, rows, columns, x)
    y = matrix.times(matrix.flat(x, columns), Epilogue(x.dtype, None, bias))
    return y.view(*x.shape[:-1], rows)


def resized(x: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


frozen_linear.register_fake(lambda x, parts, packing, rows, columns: resized(x, rows))
frozen_linear_t.register_fake(lambda g, parts, packing, rows, columns: resized(g, columns))
biased_linear.register_fake(lambda x, bias, parts, packing, rows, columns: resized(x, rows))


def product_flops(x: Tensor, parts: Any, packing: str, rows: int, columns: int) -> int:
    """Two operations for every weight and row of x."""
    del parts, packing
    return 2 * (x.numel() // x.shape[-1]) * rows * columns


frozen_linear.register_cost(
    lambda x, parts, packing, rows, columns: product_scratch(
        x, packing, rows, columns, inputs=(columns,), output=rows
    ),
    product_flops,
)
frozen_linear_t.register_cost(
    lambda g, parts, packing, rows, columns: product_scratch(
        g, packing, rows, columns, inputs=(rows,), output=columns, back=True
    ),
    product_flops,
)


def keep_parts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, parts, ctx.packing, ctx.rows, ctx.columns = inputs
    ctx.save_for_backward(*parts)


def gradient_by(
    other: Callable[..., Tensor],
) -> Callable[[Any, Tensor], tuple[Tensor, list[None], None, None, None]]:
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, list[None], None, None, None]:
        parts = list(ctx.saved_tensors)
        gradient = other(g, parts, ctx.packing, ctx.rows, ctx.columns)
        return gradient, [None] * len(parts), None, None, None

    return backward


frozen_linear.register_autograd(gradient_by(frozen_linear_t), setup_context=keep_parts)
frozen_linear_t.register_autograd(gradient_by(frozen_linear), setup_context=keep_parts)


def keep_biased(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, *rest = inputs
    keep_parts(ctx, (x, *rest), output)
    ctx.bias_dtype = bias.dtype


def biased_gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    to_x, to_bias = ctx.needs_input_grad[:2]
    parts = list(ctx.saved_tensors)
    back = frozen_linear_t(g, parts, ctx.packing, ctx.rows, ctx.columns) if to_x else None
    bias = g.reshape(-1, ctx.rows).sum(0).to(ctx.bias_dtype) if to_bias else None
    return back, bias, [None] * len(parts), *[None] * 3


biased_linear.register_autograd(biased_gradient, setup_context=keep_biased)


def unpacked(x: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int) -> Tensor:
    """Return the dense matrix in x's dtype, as a function transform multiplies it."""
    return dense(parts, packing.rpartition(":")[2], rows, columns, x.dtype)


def biased_of_torch(x: Tensor, bias: Tensor, *packed: Any) -> Tensor:
    return F.linear(x, unpacked(x, *packed), bias.to(x.dtype))


frozen_linear.register_transformed(lambda x, *packed: F.linear(x, unpacked(x, *packed)))
frozen_linear_t.register_transformed(lambda g, *packed: g @ unpacked(g, *packed))
biased_linear.register_transformed(biased_of_torch)
