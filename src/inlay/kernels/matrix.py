"""A frozen matrix, however it is held: its products, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.cost import Scratch, on_cpu, planned_dtype
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.formats import DENSE, FORMATS, reads_on_cpu
from inlay.kernels.scratch import TILE_BYTES, cast, product_dtype, scratch, tile_rows, tiles

UNPACKING = (4 << 20, 4 << 20, 2 << 20)
"""About the bytes that unpacking a chunk of a packed weight holds in between."""


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
        """Return some rows as a dense matrix; the next call overwrites rows that were unpacked."""
        if self.packing == DENSE:
            some = self.parts[0][rows]
        else:
            some = scratch(rows.stop - rows.start, self.columns, self.dtype, self.device)
            FORMATS[self.packing].dequantize(self.parts, some, rows.start)
        return Matrix([some], DENSE, len(some), self.columns, like)

    def each_tile(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield every row range with its rows; the next tile overwrites them."""
        step = tile_rows(self.rows, self.columns, self.dtype, self.device)
        for part in tiles(self.rows, step):
            tile = scratch(part.stop - part.start, self.columns, self.dtype, self.device)
            FORMATS[self.packing].dequantize(self.parts, tile, part.start)
            yield part, tile

    def flat(self, x: Tensor, width: int) -> Tensor:
        """Return x as rows of `width`, cast to the product's dtype unless read as they are."""
        rows = x.reshape(-1, width)
        return rows if self.reads else cast(rows, self.dtype)

    @staticmethod
    def quantized_blocks(
        count: int, rows: int, columns: int, back: bool | None
    ) -> tuple[int, ...] | None:
        """Bytes of the blocks of a product with a weight quantised anew; None where it is not.

        count: rows of x. back: whether the product is `g @ W`; None: there is no product.
        """
        del count, rows, columns, back

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
        """Return the format's own product, or None if it has none.

        The choice does not depend on the low-rank term: it is the same with an adapter on or off.
        """
        fits = self.reads or (self.device.type != "cpu" and self.whole is None)
        product = FORMATS[self.packing].product if fits else None
        if product is None:
            return None
        return product(x, self.parts, width, transposed, epilogue, self.dtype)

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
        g = cast(g, self.dtype)
        if self.whole is not None:
            return g @ self.whole
        x = g.new_empty(g.shape[0], self.columns)
        for part, tile in self.each_tile():
            torch.addmm(x, g[:, part], tile, beta=0 if part.start == 0 else 1, out=x)
        return x

    def factor(self, x: Tensor) -> Tensor:
        return cast(x, torch.float32 if self.reads else self.dtype)

    def narrow(self, x: Tensor, factor: Tensor, scale: float = 1.0) -> Tensor:
        """`scale * x @ factor`, where x or `factor` is a low-rank factor, in fp32 or `dtype`."""
        widened = self.dtype == torch.float32 and x.dtype == factor.dtype
        own = self.reads and not widened
        direct = native.product(x, factor, False, dtype=self.dtype) if own else None
        if direct is not None:
            return direct if scale == 1.0 else direct.mul_(scale)
        x, factor = cast(x, self.dtype), cast(factor, self.dtype)
        return torch.addmm(x.new_empty(()), x, factor, beta=0, alpha=scale)


MATRICES: dict[str, type[Matrix]] = {"": Matrix}
"""Prefix of a format's name -> how the weight is multiplied; `8bit:nf4` has the prefix 8bit."""


def matrix_of(
    parts: Sequence[Tensor], packing: str, rows: int, columns: int, like: Tensor
) -> Matrix:
    prefix, _, name = packing.rpartition(":")
    return MATRICES[prefix](parts, name, rows, columns, like)


def product_scratch(
    x: Tensor,
    packing: str,
    rows: int,
    columns: int,
    *,
    inputs: tuple[int, ...],
    output: int,
    rank: int = 0,
    back: bool | None = False,
) -> Scratch:
    """Return the scratch of a product with a frozen matrix and a low-rank term of this rank.

    Where x is multiplied in another dtype, the product holds, for every row of x, blocks of the
    widths of its inputs, unless they are read as they are, and the sums of its output.
    back: whether the product is `g @ W`; None: there is no product.
    """
    prefix, _, name = packing.rpartition(":")
    dtype = planned_dtype(x)
    count = x.numel() // x.shape[-1]
    blocks = MATRICES[prefix].quantized_blocks(count, rows, columns, back) if on_cpu() else None
    reads = on_cpu() and reads_on_cpu(name, x, columns)
    as_is = reads and x.dtype in native.OUTPUTS
    depth = rows if back else columns
    summed = blocks is not None or not as_is or native.keeps_sums(depth, rank, dtype)
    widths = (*(() if as_is else inputs), rank, output if summed else 0)
    wide = torch.float32 if reads else dtype
    casts = () if wide == x.dtype else tuple(count * w * wide.itemsize for w in widths)
    if blocks is not None:
        return Scratch((*casts, *blocks))
    if name == DENSE and dtype == x.dtype and not reads:
        return Scratch(casts, multiplied=(count, columns, rows))
    if reads:
        return Scratch(casts)
    unpacking = () if name == DENSE else UNPACKING
    step = tile_rows(rows, columns, dtype, torch.device("cpu" if on_cpu() else "cuda"))
    tile = step * columns * dtype.itemsize
    if not on_cpu():
        return Scratch((*unpacking, tile))
    return Scratch((*casts, *unpacking), max(tile, TILE_BYTES), (count, columns, step))
