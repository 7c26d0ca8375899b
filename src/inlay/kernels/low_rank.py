"""Products with a frozen weight and a low-rank term: what LoRA and its relatives compute.

Saved for the backward pass are the packed parts, the two factors and the input x, one tensor for
all the layers that read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.cost import Scratch
from inlay.kernels.epilogue import Epilogue, LowRank
from inlay.kernels.frozen import resized
from inlay.kernels.matrix import matrix_of, product_scratch
from inlay.kernels.opaque import operator
from inlay.kernels.scratch import cast


@operator("low_rank_linear", lowers=1)
def low_rank_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    parts: Sequence[Tensor],
    packing: str,
    rows: int,
    columns: int,
) -> Tensor:
    """`x @ (W + s B A).T + bias`; x: (*b, in) -> (*b, out); a: (r, in), b: (out, r).

    The low-rank term is added to the product's sums, before they are rounded to x's dtype.
    """
    matrix = matrix_of(parts, packing, rows, columns, x)
    flat = matrix.flat(x, columns)
    inner = matrix.narrow(flat, matrix.factor(a).t())
    term = LowRank(inner, matrix.factor(b).t(), scale)
    y = matrix.times(flat, Epilogue(x.dtype, term, bias))
    return y.view(*x.shape[:-1], rows)


@operator("low_rank_linear_backward")
def low_rank_linear_backward(
    g: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    parts: Sequence[Tensor],
    packing: str,
    rows: int,
    columns: int,
    to_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to x (empty unless `to_x`), a and b; `x @ a.T` is computed again."""
    matrix = matrix_of(parts, packing, rows, columns, x)
    flat, grad = matrix.flat(x, columns), matrix.flat(g, rows)
    inner, outer = matrix.factor(a), matrix.factor(b)
    through = matrix.narrow(grad, outer)
    to_a = matrix.narrow(through.t().contiguous(), flat, scale)
    to_b = matrix.narrow(matrix.narrow(flat, inner.t()).t().contiguous(), grad, scale)
    to_a, to_b = cast(to_a, a.dtype), cast(to_b.t().contiguous(), b.dtype)
    if not to_x:
        return x.new_empty(0), to_a, to_b
    back = matrix.times_t(grad, Epilogue(x.dtype, LowRank(through, inner, scale)))
    return back.view(x.shape), to_a, to_b


low_rank_linear.register_fake(
    lambda x, a, b, bias, scale, parts, packing, rows, columns: resized(x, rows)
)
low_rank_linear_backward.register_fake(
    lambda g, x, a, b, scale, parts, packing, rows, columns, to_x: (
        x.new_empty(x.shape if to_x else (0,)),
        torch.empty_like(a),
        torch.empty_like(b),
    )
)


def gradients_scratch(
    x: Tensor, rank: int, packing: str, rows: int, columns: int, to_x: bool
) -> Scratch:
    """Scratch of the gradients: x and g are read, and the gradient to x is summed."""
    back, output = (True, columns) if to_x else (None, 0)
    return product_scratch(
        x, packing, rows, columns, inputs=(columns, rows), output=output, rank=rank, back=back
    )


low_rank_linear.register_cost(
    lambda x, a, b, bias, scale, parts, packing, rows, columns: product_scratch(
        x, packing, rows, columns, inputs=(columns,), output=rows, rank=len(a)
    ),
    # Two operations for every weight, the factors' included, and row of x.
    lambda x, a, b, bias, scale, parts, packing, rows, columns: (
        2 * (x.numel() // columns) * (rows * columns + len(a) * (rows + columns))
    ),
)
low_rank_linear_backward.register_cost(
    lambda g, x, a, b, scale, parts, packing, rows, columns, to_x: gradients_scratch(
        x, len(a), packing, rows, columns, to_x
    ),
    # The frozen product when x has a gradient, and six products with the factors.
    lambda g, x, a, b, scale, parts, packing, rows, columns, to_x: (
        2 * (x.numel() // columns) * (to_x * rows * columns + 3 * len(a) * (rows + columns))
    ),
)


def keep_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, a, b, bias, ctx.scale, parts, ctx.packing, ctx.rows, ctx.columns = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, a, b, *parts)


def low_rank_gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, a, b, *parts = ctx.saved_tensors
    to_x = bool(ctx.needs_input_grad[0])
    shape = (ctx.packing, ctx.rows, ctx.columns, to_x)
    back, to_a, to_b = low_rank_linear_backward(g, x, a, b, ctx.scale, parts, *shape)
    biased = ctx.biased and ctx.needs_input_grad[3]
    to_bias = g.reshape(-1, ctx.rows).sum(0) if biased else None
    return back if to_x else None, to_a, to_b, to_bias, None, [None] * len(parts), *[None] * 3


low_rank_linear.register_autograd(low_rank_gradient, setup_context=keep_factors)
