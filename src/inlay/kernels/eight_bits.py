"""Products with a frozen weight in 8 bits, both directions: int8 on a CPU, FP8 on Hopper.

Weight and activations are quantised for the product alone, one scale a row each; sums are exact in
int32. `g @ W` needs no second copy of W: its row scales `s` are folded into g, as
`g @ diag(s) Q = (g s) @ Q`. Not exact (about 1% of a product), so it is off unless asked for.

A matrix that narrows is multiplied in int8 backward only. An MLP's last one reads products of two
activations, whose tails one scale a row holds badly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.formats import FORMATS
from inlay.kernels.gpu import runs_on
from inlay.kernels.matrix import MATRICES, Matrix
from inlay.kernels.scratch import scratch, tile_rows, tiles

PREFIX = "8bit"
"""`8bit:nf4` is the NF4 format, multiplied in 8 bits."""


class EightBitMatrix(Matrix):
    """A frozen (rows, columns) matrix that is multiplied in 8 bits."""

    @staticmethod
    def quantized_blocks(
        count: int, rows: int, columns: int, back: bool | None
    ) -> tuple[int, ...] | None:
        """Bytes of a tile of the weight, the codes of x or g, the sums; None: not in int8."""
        if not back and columns > rows:
            return None
        if back is None:
            return ()
        step = tile_rows(rows, columns, torch.int8, torch.device("cpu"))
        if not back:
            return (step * columns, count * columns, 4 * count * step)
        return (step * columns, 4 * count * step, count * step, *[4 * count * columns] * 2)

    def times(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        in_fp8 = self.in_fp8(x, transposed=True)
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
        in_fp8 = self.in_fp8(g, transposed=False)
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

    def in_fp8(self, x: Tensor, *, transposed: bool) -> Tensor | None:
        """Return `x @ W.T` if transposed, else `x @ W`, in FP8; None where the GPU has no FP8."""
        values = FORMATS[self.packing].fp8_values
        if values is None or not runs_on(x.device):
            return None
        from inlay.kernels.gpu import fp8

        if not fp8.multiplies(x.device, self.rows, self.columns):
            return None
        if transposed:
            return fp8.times(x, self.parts, values(x.device), self.rows)
        return fp8.times_t(x, self.parts, values(x.device), self.columns)

    def int8_tiles(self) -> Iterator[slice]:
        return tiles(self.rows, tile_rows(self.rows, self.columns, torch.int8, self.device))

    def int8_rows(self, part: slice) -> tuple[Tensor, Tensor]:
        first, count = part.start, part.stop - part.start
        held = FORMATS[self.packing]
        found = held.int8_rows(self.parts, first, count, self.columns) if held.int8_rows else None
        if found is not None:
            return found
        tile = scratch(count, self.columns, torch.float32, self.device)
        held.dequantize(self.parts, tile, first)
        q, absmax = native.int8_quantize(tile)
        return q, absmax / 127


MATRICES[PREFIX] = EightBitMatrix
