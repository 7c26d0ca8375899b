"""FP8 (e4m3) products on a GPU: rows scaled to the format's range, products by cuBLAS.

    y = x @ W.T      ~  (x8 @ W8.T) * sx * sw.T      sx: (n, 1), sw: (out, 1)
    g @ W            ~  (g8 @ W8) * sg               g8, sg from g * sw.T

so that one quantisation of W, row by row, serves both directions. cuBLAS multiplies row-major
FP8 by column-major FP8 only: backward writes the same W8 the other way round.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.gpu.nf4 import BLOCK, block_scales, pointers

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-30
"""A row whose magnitudes are all below this is scaled as if it were this."""
WIDTH = 4096
TILE_ROWS = 64


@triton.jit
def scale_and_inverse(largest):
    """Return the scale that takes `largest` to 448, and its inverse; a NaN stays one."""
    safe = tl.where(largest < 1e-30, 1e-30, largest)
    return safe * (1.0 / 448.0), tl.div_rn(448.0, safe)


@triton.jit
def quantize_row(
    x, factors, out, scales, columns,
    FACTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scale one row of x, times `factors` when FACTORS, to e4m3."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((WIDTH,), 0.0, tl.float32)
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        v = tl.load(x + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        if FACTORS:
            v = v * tl.load(factors + column, mask=column < columns, other=0.0)
        largest = tl.maximum(largest, tl.abs(v))
    scale, inverse = scale_and_inverse(tl.max(largest, axis=0))
    tl.store(scales + row, scale)
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        v = tl.load(x + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        if FACTORS:
            v = v * tl.load(factors + column, mask=column < columns, other=0.0)
        tl.store(out + row * columns + column, (v * inverse).to(tl.float8e4nv), column < columns)


@triton.jit
def nf4_row_scale(
    absmax, nested_absmax, nested_map, offset, scales, per_row,
    NESTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the scale of one row of W: its largest block scale over 448."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((WIDTH,), 0.0, tl.float32)
    for first in range(0, per_row, WIDTH):
        at = first + tl.arange(0, WIDTH)
        inside = at < per_row
        block = row * per_row + at
        found = block_scales(absmax, nested_absmax, nested_map, offset, block, inside, NESTED)
        largest = tl.maximum(largest, tl.where(inside, tl.abs(found), 0.0))
    scale, _ = scale_and_inverse(tl.max(largest, axis=0))
    tl.store(scales + row, scale)


@triton.jit
def nf4_tile(
    packed, absmax, nested_absmax, nested_map, offset, quantiles,
    scales, out, rows, per_row, row_step, column_step,
    NESTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scale ROWS rows of one block of columns of W to e4m3, in either memory order."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    block = row * per_row + tl.program_id(1)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(packed + byte, mask=inside[:, None], other=0).to(tl.int32)
    values = tl.join(tl.load(quantiles + (pair >> 4)), tl.load(quantiles + (pair & 15)))
    found = block_scales(absmax, nested_absmax, nested_map, offset, block, inside, NESTED)
    weights = tl.reshape(values, (ROWS, 64)) * found[:, None]
    inverse = tl.div_rn(1.0, tl.load(scales + row, mask=inside, other=1.0))
    column = tl.program_id(1) * 64 + tl.arange(0, 64)
    target = out + row[:, None] * row_step + column[None, :] * column_step
    tl.store(target, (weights * inverse[:, None]).to(tl.float8e4nv), mask=inside[:, None])


@triton.jit
def dense_tile(
    w, scales, out, rows, columns, row_step, column_step,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Scale a tile of a dense W, ROWS by 64, to e4m3, in either memory order."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * 64 + tl.arange(0, 64)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    v = tl.load(w + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    inverse = tl.div_rn(1.0, tl.load(scales + row, mask=row < rows, other=1.0))
    target = out + row[:, None] * row_step + column[None, :] * column_step
    tl.store(target, (v.to(tl.float32) * inverse[:, None]).to(tl.float8e4nv), mask=inside)


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x, times `factors` (columns,) if given, as e4m3 with one fp32 scale a row (n, 1)."""
    x = x.contiguous()
    out, scales = torch.empty_like(x, dtype=FP8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    quantize_row[(x.shape[0],)](
        x, scales if factors is None else factors, out, scales, x.shape[1],
        FACTORS=factors is not None, WIDTH=WIDTH, enable_fp_fusion=False,
    )  # fmt: skip
    return out, scales


def nf4_weight(parts: Sequence[Tensor], quantiles: Tensor, out: Tensor) -> Tensor:
    """Write an NF4 weight to `out` (rows, columns), e4m3, of any strides; return its scales.

    `columns` is a multiple of 64. A row's scale (rows, 1) is its largest block's over 448.
    """
    rows, per_row = out.shape[0], out.shape[1] // BLOCK
    tensors, nested = pointers(parts)
    scales = torch.empty(rows, 1, device=out.device)
    nf4_row_scale[(rows,)](
        *tensors[1:], scales, per_row, NESTED=nested, WIDTH=256, enable_fp_fusion=False
    )
    nf4_tile[(triton.cdiv(rows, TILE_ROWS), per_row)](
        *tensors, quantiles, scales, out, rows, per_row, *out.stride(),
        NESTED=nested, ROWS=TILE_ROWS, enable_fp_fusion=False,
    )  # fmt: skip
    return scales


def dense_weight(w: Tensor, out: Tensor) -> Tensor:
    """Write a dense weight to `out` (rows, columns), e4m3, of any strides; return its scales."""
    w = w.contiguous()
    rows, columns = w.shape
    largest = w.abs().amax(1, keepdim=True).float()
    scales = torch.where(largest < SMALLEST, SMALLEST, largest) * (1.0 / LARGEST)
    dense_tile[(triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, BLOCK))](
        w, scales, out, rows, columns, *out.stride(), ROWS=TILE_ROWS, enable_fp_fusion=False
    )
    return scales


def weight(parts: Sequence[Tensor], quantiles: Tensor | None, out: Tensor) -> Tensor:
    """Write a weight, dense (one part) or NF4, to `out` as e4m3; return its scales (rows, 1)."""
    if len(parts) == 1:
        return dense_weight(parts[0], out)
    assert quantiles is not None
    return nf4_weight(parts, quantiles, out)


def multiplies(device: torch.device, rows: int, columns: int) -> bool:
    newer = torch.cuda.get_device_capability(device) >= (8, 9)
    return newer and rows % 16 == 0 and columns % BLOCK == 0


def times(x: Tensor, parts: Sequence[Tensor], quantiles: Tensor | None, rows: int) -> Tensor:
    """Return `x @ W.T` in x's dtype by FP8; x: (n, in) -> (n, rows)."""
    with torch.cuda.device_of(x):
        w8 = torch.empty(rows, x.shape[1], dtype=FP8, device=x.device)
        scales = weight(parts, quantiles, w8)
        x8, sx = quantize_rows(x)
        y = torch._scaled_mm(x8, w8.t(), sx, scales.t(), out_dtype=torch.bfloat16)
    return y.to(x.dtype)


def times_t(g: Tensor, parts: Sequence[Tensor], quantiles: Tensor | None, columns: int) -> Tensor:
    """Return `g @ W` in g's dtype by FP8; g: (n, out) -> (n, columns)."""
    with torch.cuda.device_of(g):
        w8 = torch.empty(columns, g.shape[1], dtype=FP8, device=g.device).t()
        g8, sg = quantize_rows(g, weight(parts, quantiles, w8))
        ones = torch.ones(1, columns, device=g.device)
        x = torch._scaled_mm(g8, w8, sg, ones, out_dtype=torch.bfloat16)
    return x.to(g.dtype)
