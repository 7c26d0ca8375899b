"""Products with a frozen weight in 8 bits, both directions: int8 on a CPU, FP8 on Hopper.

Weight and activations are quantised for the product alone, one scale a row each; sums are exact in
int32. `g @ W` needs no second copy of W: its row scales `s` are folded into g, as
`g @ diag(s) Q = (g s) @ Q`. Not exact (about 1% of a product), so it is off unless asked for.

A matrix that narrows is multiplied in int8 backward only. An MLP's last one reads products of two
activations, whose tails one scale a row holds badly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.frozen import DENSE, FORMATS, MATRICES, Matrix
from inlay.kernels.gpu import runs_on
from inlay.kernels.scratch import scratch, tile_rows, tiles

PREFIX = "8bit"
"""`8bit:nf4` is the NF4 format, multiplied in 8 bits."""

Rows = Callable[[Sequence[Tensor], int, int, int], tuple[Tensor, Tensor] | None]
"""`(parts, first, count, columns)` -> those rows as int8 and their scales (count,), or None."""
ROWS: dict[str, Rows] = {}
"""Format name -> how its parts become int8 rows without a dense weight between."""

Product = Callable[[Tensor, Sequence[Tensor], int], Tensor | None]
"""`(x, parts, width)` -> a product of that width in FP8, or None."""
FP8_PRODUCTS: dict[str, tuple[Product, Product]] = {}
"""Format name -> `x @ W.T` and `g @ W`."""


def register_rows(name: str, rows: Rows) -> None:
    """Make a packed format's own way to int8 known under `name`."""
    ROWS[name] = rows


def register_fp8(name: str, times: Product, times_t: Product) -> None:
    """Make a packed format's FP8 products known under `name`."""
    FP8_PRODUCTS[name] = times, times_t


def dense_rows(
    parts: Sequence[Tensor], first: int, count: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Quantise rows of a dense weight."""
    del columns
    q, absmax = native.int8_quantize(parts[0][first : first + count])
    return q, absmax / 127


def dense_in_fp8(x: Tensor, parts: Sequence[Tensor], rows: int) -> Tensor | None:
    """Return `x @ W.T` of a dense weight in FP8, where the GPU has it."""
    if not multiplies_in_fp8(x, parts[0].shape):
        return None
    from inlay.kernels.gpu import fp8

    return fp8.times(x, parts, x, rows)


def dense_t_in_fp8(g: Tensor, parts: Sequence[Tensor], columns: int) -> Tensor | None:
    """Return `g @ W` of a dense weight in FP8, where the GPU has it."""
    if not multiplies_in_fp8(g, parts[0].shape):
        return None
    from inlay.kernels.gpu import fp8

    return fp8.times_t(g, parts, g, columns)


def multiplies_in_fp8(x: Tensor, shape: Sequence[int]) -> bool:
    """Say whether a GPU multiplies x by a weight of this shape in FP8."""
    if not runs_on(x.device):
        return False
    from inlay.kernels.gpu import fp8

    return fp8.multiplies(x.device, *shape)


register_rows(DENSE, dense_rows)
register_fp8(DENSE, dense_in_fp8, dense_t_in_fp8)


class EightBitMatrix(Matrix):
    """A frozen (rows, columns) matrix that is multiplied in 8 bits."""

    def times(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        in_fp8 = self.fp8(0, x, self.rows)
        if in_fp8 is not None:
            return epilogue.applied(in_fp8)
        if self.device.type != "cpu" or self.columns > self.rows:
            return super().times(x, epilogue)
        codes, absmax = native.int8_quantize(x)
        y = x.new_empty(x.shape[0], self.rows, dtype=self.dtype)
        for part in self.int8_tiles():
            self.write_tile(part, codes, absmax / 127, y[:, part])
        return epilogue.applied(y)

    def times_t(self, g: Tensor, epilogue: Epilogue) -> Tensor:
        in_fp8 = self.fp8(1, g, self.columns)
        if in_fp8 is not None:
            return epilogue.applied(in_fp8)
        if self.device.type != "cpu":
            return super().times_t(g, epilogue)
        total = None
        for part in self.int8_tiles():
            x = self.from_tile(part, g[:, part])
            total = x if total is None else total.add_(x)
        assert total is not None
        return epilogue.applied(total)

    def write_tile(self, part: slice, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """Write `x @ W.T` for some rows of W; x: codes int8 (n, columns), scales (n,)."""
        q, row_scales = self.int8_rows(part)
        native.int8_rescale(torch.ops.aten._int_mm(codes, q.t()), scales, row_scales, out)

    def from_tile(self, part: slice, g: Tensor) -> Tensor:
        """Return `g @ W` for some rows of W; g: (n, part)."""
        q, row_scales = self.int8_rows(part)
        codes, absmax = native.int8_quantize(g * row_scales)
        x = g.new_empty(g.shape[0], self.columns, dtype=self.dtype)
        ones = torch.ones(self.columns)
        native.int8_rescale(torch.ops.aten._int_mm(codes, q), absmax / 127, ones, x)
        return x

    def fp8(self, direction: int, x: Tensor, width: int) -> Tensor | None:
        """Return the product in FP8 where the device and the format have it."""
        products = FP8_PRODUCTS.get(self.packing)
        return products[direction](x, self.parts, width) if products else None

    def int8_tiles(self) -> Iterator[slice]:
        """Return the row ranges that are brought into int8 at once."""
        return tiles(self.rows, tile_rows(self.rows, self.columns, torch.int8, self.device))

    def int8_rows(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return rows in int8 and their scales, by the format's own way or from dense rows."""
        first, count = part.start, part.stop - part.start
        rows = ROWS.get(self.packing)
        found = rows(self.parts, first, count, self.columns) if rows else None
        if found is not None:
            return found
        tile = scratch(count, self.columns, torch.float32, self.device)
        FORMATS[self.packing](self.parts, tile, first)
        q, absmax = native.int8_quantize(tile)
        return q, absmax / 127


MATRICES[PREFIX] = EightBitMatrix
