"""Products with a frozen weight, however it is held, with and without a low-rank term.

The weight is unpacked inside an opaque operator, tile by tile, for the product alone. The gradient
of each operator is a *different* operator: a compiler that saw one operator twice would merge the
two unpackings and keep the dense weight for the backward pass. What is saved is the packed parts,
which the model holds anyway, and for a low-rank term its two factors and the input x, one tensor
for all the layers that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.epilogue import Epilogue, LowRank
from inlay.kernels.opaque import operator
from inlay.kernels.scratch import cast, product_dtype, scratch, tile_rows, tiles
from inlay.kernels.switches import is_on

Dequantize = Callable[[Sequence[Tensor], Tensor, int], None]
"""`(parts, out, first)`: write the dense matrix's rows from `first` on into `out` (n, in)."""

FORMATS: dict[str, Dequantize] = {}
"""Format name -> how its packed parts become rows of a dense matrix."""


def register_format(name: str, dequantize: Dequantize) -> None:
    """Make a packed format known to the operators under `name`."""
    FORMATS[name] = dequantize


Product = Callable[[Tensor, Sequence[Tensor], int, bool, Epilogue, torch.dtype], Tensor | None]
"""`(x, parts, width, transposed, epilogue, dtype)` -> what the epilogue makes of `x @ W.T` if
transposed, or of `x @ W`, multiplied in `dtype`; (n, width), or None where the weight is unpacked
first."""


class OwnProduct(NamedTuple):
    """A format's own product, which reads the packed parts as they are."""

    product: Product
    on_cpu: Callable[[torch.dtype, int], bool]
    """`(dtype, columns)` -> whether it takes x in that dtype."""


PRODUCTS: dict[str, OwnProduct] = {}
"""Format name -> its own product."""


def register_product(
    name: str, product: Product, on_cpu: Callable[[torch.dtype, int], bool]
) -> None:
    """Make a format's own product known to the operators under `name`."""
    PRODUCTS[name] = OwnProduct(product, on_cpu)


FEWEST_ROWS = 8
"""Rows of x below which bfloat16 arithmetic is left to PyTorch: a weight is not packed for them."""


def reads_on_cpu(packing: str, x: Tensor, columns: int) -> bool:
    """Say whether a format's own product multiplies x on this CPU."""
    dtype = product_dtype(x)
    few = dtype != torch.float32 and x.numel() < FEWEST_ROWS * x.shape[-1]
    if few or not is_on("products") or not native.multiplies(dtype):
        return False
    return packing in PRODUCTS and PRODUCTS[packing].on_cpu(x.dtype, columns)


def copy_rows(parts: Sequence[Tensor], out: Tensor, first: int) -> None:
    """Unpack a dense weight (out, in): cast its rows."""
    out.copy_(parts[0][first : first + out.shape[0]])


def dense_product(
    x: Tensor,
    parts: Sequence[Tensor],
    width: int,
    transposed: bool,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return `x @ W.T`, or `x @ W`, the weight read as it is."""
    del width
    return native.product(x, parts[0], transposed, epilogue, dtype)


def is_half(dtype: torch.dtype, columns: int) -> bool:
    """Say whether x is in bfloat16."""
    del columns
    return dtype == torch.bfloat16


DENSE = "dense"
register_format(DENSE, copy_rows)
register_product(DENSE, dense_product, is_half)


@operator("dense")
def dense(
    parts: Sequence[Tensor], packing: str, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the whole dense (rows, columns) matrix in `dtype`."""
    out = torch.empty(rows, columns, dtype=dtype, device=parts[0].device)
    FORMATS[packing](parts, out, 0)
    return out


@dense.register_fake
def _(parts: Sequence[Tensor], packing: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(rows, columns, dtype=dtype)


class Matrix:
    """A frozen (rows, columns) matrix that is multiplied in one dtype, tile by tile."""

    def __init__(
        self, parts: Sequence[Tensor], packing: str, rows: int, columns: int, like: Tensor
    ) -> None:
        self.parts, self.packing, self.rows, self.columns = parts, packing, rows, columns
        self.dtype, self.device = product_dtype(like), like.device
        self.whole = parts[0] if packing == DENSE and parts[0].dtype == self.dtype else None
        self.reads = like.dtype in native.OUTPUTS and reads_on_cpu(packing, like, columns)

    def part(self, rows: slice, like: Tensor) -> Matrix:
        """Return some rows as a dense matrix; unpacked ones are overwritten by the next part's."""
        if self.packing == DENSE:
            some = self.parts[0][rows]
        else:
            some = scratch(rows.stop - rows.start, self.columns, self.dtype, self.device)
            FORMATS[self.packing](self.parts, some, rows.start)
        return Matrix([some], DENSE, len(some), self.columns, like)

    def each_tile(self):
        """Every row range with those rows; a tile is overwritten by the next."""
        step = tile_rows(self.rows, self.columns, self.dtype, self.device)
        for part in tiles(self.rows, step):
            tile = scratch(part.stop - part.start, self.columns, self.dtype, self.device)
            FORMATS[self.packing](self.parts, tile, part.start)
            yield part, tile

    def flat(self, x: Tensor, width: int) -> Tensor:
        """Return x as rows of `width`, in the dtype of the product unless they are read as is."""
        rows = x.reshape(-1, width)
        return rows if self.reads else cast(rows, self.dtype)

    def times(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        """`x @ W.T`; x: (n, columns) -> (n, rows)."""
        direct = self.own(x, self.rows, True, epilogue)
        if direct is not None:
            return direct
        if self.whole is None:
            return epilogue.applied(self.by_tiles(x))
        y = F.linear(cast(x, self.dtype), self.whole, epilogue.bias_in(self.dtype))
        return epilogue.without_bias.applied(y)

    def times_t(self, g: Tensor, epilogue: Epilogue) -> Tensor:
        """`g @ W`; g: (n, rows) -> (n, columns)."""
        direct = self.own(g, self.columns, False, epilogue)
        return epilogue.applied(self.by_tiles_t(g)) if direct is None else direct

    def own(self, x: Tensor, width: int, transposed: bool, epilogue: Epilogue) -> Tensor | None:
        """Return the product by the format's own way, or None if it has none.

        With a term or without, and so with an adapter on or off, the way is the same.
        """
        fits = self.reads or (self.device.type != "cpu" and self.whole is None)
        own = PRODUCTS.get(self.packing) if fits else None
        if own is None:
            return None
        return own.product(x, self.parts, width, transposed, epilogue, self.dtype)

    def by_tiles(self, x: Tensor) -> Tensor:
        """`x @ W.T`, the weight unpacked tile by tile if it is not held in the product's dtype."""
        x = cast(x, self.dtype)
        if self.whole is not None:
            return F.linear(x, self.whole)
        y = x.new_empty(x.shape[0], self.rows)
        for part, tile in self.each_tile():
            torch.mm(x, tile.t(), out=y[:, part])
        return y

    def by_tiles_t(self, g: Tensor) -> Tensor:
        """`g @ W`, the weight unpacked likewise."""
        g = cast(g, self.dtype)
        if self.whole is not None:
            return g @ self.whole
        x = g.new_empty(g.shape[0], self.columns)
        for part, tile in self.each_tile():
            torch.addmm(x, g[:, part], tile, beta=0 if part.start == 0 else 1, out=x)
        return x

    def factor(self, x: Tensor) -> Tensor:
        """Return a low-rank factor as products read it: rounded by them, or in their dtype."""
        return cast(x, torch.float32 if self.reads else self.dtype)

    def narrow(self, x: Tensor, factor: Tensor, scale: float = 1.0) -> Tensor:
        """`scale * x @ factor`, of which one is a low-rank factor; fp32, or the product's dtype."""
        widened = self.dtype == torch.float32 and x.dtype == factor.dtype
        own = self.reads and not widened
        direct = native.product(x, factor, False, dtype=self.dtype) if own else None
        if direct is not None:
            return direct if scale == 1.0 else direct.mul_(scale)
        x, factor = cast(x, self.dtype), cast(factor, self.dtype)
        return torch.addmm(x.new_empty(()), x, factor, beta=0, alpha=scale)


MATRICES: dict[str, type[Matrix]] = {"": Matrix}
"""Prefix of a format's name -> how such a weight is multiplied; `8bit:nf4` has the prefix 8bit."""


def matrix_of(
    parts: Sequence[Tensor], packing: str, rows: int, columns: int, like: Tensor
) -> Matrix:
    """Return the matrix that these parts hold, to be multiplied with what is like `like`."""
    prefix, _, name = packing.rpartition(":")
    return MATRICES[prefix](parts, name, rows, columns, like)


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


@biased_linear.register_fake
def _(
    x: Tensor, bias: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


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


def keep_biased(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the packed parts, and the dtype of the bias."""
    x, bias, *rest = inputs
    keep_parts(ctx, (x, *rest), output)
    ctx.bias_dtype = bias.dtype


def biased_gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    """Return the gradients to x and to the bias."""
    to_x, to_bias = ctx.needs_input_grad[:2]
    parts = list(ctx.saved_tensors)
    back = frozen_linear_t(g, parts, ctx.packing, ctx.rows, ctx.columns) if to_x else None
    bias = g.reshape(-1, ctx.rows).sum(0).to(ctx.bias_dtype) if to_bias else None
    return back, bias, [None] * len(parts), *[None] * 3


biased_linear.register_autograd(biased_gradient, setup_context=keep_biased)


def unpacked(x: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int) -> Tensor:
    """Return the dense matrix in x's dtype, as a function transform multiplies it."""
    return dense(parts, packing.rpartition(":")[2], rows, columns, x.dtype)


def linear_of_torch(x: Tensor, *packed: Any) -> Tensor:
    """`x @ W.T` by PyTorch's own operators."""
    return F.linear(x, unpacked(x, *packed))


def linear_t_of_torch(g: Tensor, *packed: Any) -> Tensor:
    """`g @ W` by PyTorch's own operators."""
    return g @ unpacked(g, *packed)


def biased_of_torch(x: Tensor, bias: Tensor, *packed: Any) -> Tensor:
    """`x @ W.T + bias` by PyTorch's own operators."""
    return F.linear(x, unpacked(x, *packed), bias.to(x.dtype))


frozen_linear.register_transformed(linear_of_torch)
frozen_linear_t.register_transformed(linear_t_of_torch)
biased_linear.register_transformed(biased_of_torch)


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


@low_rank_linear.register_fake
def _(
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
    return x.new_empty(*x.shape[:-1], rows)


@low_rank_linear_backward.register_fake
def _(
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
    return x.new_empty(x.shape if to_x else (0,)), torch.empty_like(a), torch.empty_like(b)


def keep_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep x, the two factors and the packed parts."""
    del output
    x, a, b, bias, ctx.scale, parts, ctx.packing, ctx.rows, ctx.columns = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, a, b, *parts)


def low_rank_gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    """Return the gradients to x, a, b and the bias by the opaque backward operator."""
    x, a, b, *parts = ctx.saved_tensors
    to_x = bool(ctx.needs_input_grad[0])
    shape = (ctx.packing, ctx.rows, ctx.columns, to_x)
    back, to_a, to_b = low_rank_linear_backward(g, x, a, b, ctx.scale, parts, *shape)
    biased = ctx.biased and ctx.needs_input_grad[3]
    to_bias = g.reshape(-1, ctx.rows).sum(0) if biased else None
    return back if to_x else None, to_a, to_b, to_bias, None, [None] * len(parts), *[None] * 3


low_rank_linear.register_autograd(low_rank_gradient, setup_context=keep_factors)
