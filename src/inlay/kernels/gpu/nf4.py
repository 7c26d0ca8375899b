"""NF4 on a GPU: unpacking rows, and products with few rows in one pass over the packed weight.

The kernels read the parts as `storage/nf4.py` holds them and round as it rounds: a block's scale
is `map[code] * nested + offset`, each operation rounded to fp32, and a weight is its quantile
times its scale, rounded to fp32 and then to the dtype of the output.
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

from inlay.kernels.native.calls import BLOCK

FEW = 16
"""Up to this many rows a product is bound by reading the weight: it is read packed."""
UNPACKED_BLOCKS = 64
MATMUL_ROWS, MATMUL_BLOCKS = 16, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def block_scales(
    absmax, nested_absmax, nested_map, offset, block, inside,
    NESTED: tl.constexpr,
):  # fmt: skip
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_absmax + block // 256, mask=inside, other=0.0)
        scales = tl.load(nested_map + code) * nested + tl.load(offset)
    else:
        scales = tl.load(absmax + block, mask=inside, other=0.0)
    return scales


@triton.jit
def unpack(
    packed, absmax, nested_absmax, nested_map, offset, quantiles,
    out, start, end, last_byte, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the weights from `start` up to `end`, counted row by row, to `out`."""
    block = start // 64 + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(packed + byte, mask=byte < last_byte, other=0).to(tl.int32)
    values = tl.join(tl.load(quantiles + (pair >> 4)), tl.load(quantiles + (pair & 15)))
    inside = block * 64 < end
    scales = block_scales(absmax, nested_absmax, nested_map, offset, block, inside, NESTED)
    weights = tl.reshape(values, (BLOCKS, 64)) * scales[:, None]
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    wanted = (place >= start) & (place < end)
    tl.store(out + (place - start), weights.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def few_rows(
    x, packed, absmax, nested_absmax, nested_map, offset,
    quantiles, y, count, rows, columns, NESTED: tl.constexpr,
    SAMPLES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write ROWS columns of `y = x @ W.T`, summed in fp32; even and odd columns of W apart."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.arange(0, SAMPLES)
    within = tl.arange(0, 32)
    per_row = columns // 64
    total = tl.full((SAMPLES, ROWS), 0.0, tl.float32)
    for first in range(0, per_row, BLOCKS):
        at = first + tl.arange(0, BLOCKS)
        block = row[:, None].to(tl.int64) * per_row + at[None, :]
        inside = (row[:, None] < rows) & (at[None, :] < per_row)
        scales = block_scales(absmax, nested_absmax, nested_map, offset, block, inside, NESTED)
        byte = block[:, :, None] * 32 + within[None, None, :]
        pair = tl.load(packed + byte, mask=inside[:, :, None], other=0).to(tl.int32)
        high = tl.load(quantiles + (pair >> 4)) * scales[:, :, None]
        low = tl.load(quantiles + (pair & 15)) * scales[:, :, None]
        column = first * 64 + tl.arange(0, BLOCKS * 32)[:, None] * 2 + tl.arange(0, 2)[None, :]
        given = (sample[:, None, None] < count) & (column[None, :, :] < columns)
        source = x + sample[:, None, None] * columns + column[None, :, :]
        even, odd = tl.split(tl.load(source, mask=given, other=0.0))
        high = tl.reshape(high.to(even.dtype), (ROWS, BLOCKS * 32))
        low = tl.reshape(low.to(even.dtype), (ROWS, BLOCKS * 32))
        total = tl.dot(even, tl.trans(high), total, input_precision="ieee")
        total = tl.dot(odd, tl.trans(low), total, input_precision="ieee")
    target = y + sample[:, None] * rows + row[None, :]
    stored = (sample[:, None] < count) & (row[None, :] < rows)
    tl.store(target, total.to(y.dtype.element_ty), mask=stored)


def pointers(parts: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    if len(parts) == 2:
        return [parts[0], parts[1], parts[1], parts[1], parts[1]], False
    return list(parts), True


def dequantize(parts: Sequence[Tensor], quantiles: Tensor, out: Tensor, first: int) -> None:
    """Write rows from `first` on of the dense matrix into `out`, (n, in), contiguous.

    `parts` is packed, absmax and with double quantisation nested_absmax, nested_map, offset.
    """
    start = first * out.shape[1]
    end = start + out.numel()
    tensors, nested = pointers(parts)
    blocks = -(-end // BLOCK) - start // BLOCK
    with torch.cuda.device_of(out):
        unpack[(triton.cdiv(blocks, UNPACKED_BLOCKS),)](
            *tensors, quantiles, out, start, end, (end + 1) // 2,
            NESTED=nested, BLOCKS=UNPACKED_BLOCKS, enable_fp_fusion=False,
        )  # fmt: skip


def multiplies(x: Tensor) -> bool:
    """Return whether `matmul` takes x, (n, in): few rows, whole blocks, no fp64."""
    return 0 < x.shape[0] <= FEW and x.shape[1] % BLOCK == 0 and x.dtype in DTYPES


def matmul(x: Tensor, parts: Sequence[Tensor], quantiles: Tensor, rows: int) -> Tensor:
    """Return `x @ W.T`; x: (n, in) with n ≤ 16 -> (n, rows), W rounded to x's dtype."""
    x = x.contiguous()
    y = x.new_empty(x.shape[0], rows)
    tensors, nested = pointers(parts)
    with torch.cuda.device_of(x):
        few_rows[(triton.cdiv(rows, MATMUL_ROWS),)](
            x, *tensors, quantiles, y, x.shape[0], rows, x.shape[1],
            NESTED=nested, SAMPLES=FEW, ROWS=MATMUL_ROWS, BLOCKS=MATMUL_BLOCKS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return y
