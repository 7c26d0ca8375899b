"""The formats in which a frozen weight is held, as the operators read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.opaque import operator
from inlay.kernels.scratch import product_dtype
from inlay.kernels.switches import is_on

Dequantize = Callable[[Sequence[Tensor], Tensor, int], None]
Product = Callable[[Tensor, Sequence[Tensor], int, bool, Epilogue, torch.dtype], Tensor | None]
Int8Rows = Callable[[Sequence[Tensor], int, int, int], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Format:
    """The functions by which operators read a storage's packed parts."""

    dequantize: Dequantize
    """`(parts, out, first)`: write the dense matrix's rows from `first` on into `out` (n, in)."""
    product: Product | None = None
    """`(x, parts, width, transposed, epilogue, dtype)` -> `x @ W.T` if transposed, else `x @ W`,
    read from the packed parts, multiplied in `dtype` and passed through the epilogue: (n, width).
    None where the weight must be unpacked first."""
    product_on_cpu: Callable[[torch.dtype, int], bool] = lambda dtype, columns: False
    """`(dtype of x, columns)` -> whether `product` works on a CPU."""
    int8_rows: Int8Rows | None = None
    """`(parts, first, count, columns)` -> rows as int8 and their scales (count,), made without a
    dense weight; or None."""
    fp8_values: Callable[[torch.device], Tensor | None] | None = None
    """The value of every code, which the FP8 kernels of a GPU read; None in the place of a table
    for a dense weight. Formats without this function have no FP8 product."""


FORMATS: dict[str, Format] = {}
"""Every format by name."""
DENSE = "dense"
FEWEST_ROWS = 8
"""Rows of x below which bfloat16 arithmetic is left to PyTorch: a weight is not packed for them."""


def reads_on_cpu(packing: str, x: Tensor, columns: int) -> bool:
    dtype = product_dtype(x)
    few = dtype != torch.float32 and x.numel() < FEWEST_ROWS * x.shape[-1]
    if few or not is_on("products") or not native.multiplies(dtype):
        return False
    return FORMATS[packing].product_on_cpu(x.dtype, columns)


@operator("dense")
def dense(
    parts: Sequence[Tensor], packing: str, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(rows, columns, dtype=dtype, device=parts[0].device)
    FORMATS[packing].dequantize(parts, out, 0)
    return out


dense.register_fake(
    lambda parts, packing, rows, columns, dtype: parts[0].new_empty(rows, columns, dtype=dtype)
)


def copy_rows(parts: Sequence[Tensor], out: Tensor, first: int) -> None:
    out.copy_(parts[0][first : first + out.shape[0]])


def int8_rows_of_dense(
    parts: Sequence[Tensor], first: int, count: int, columns: int
) -> tuple[Tensor, Tensor]:
    del columns
    q, absmax = native.int8_quantize(parts[0][first : first + count])
    return q, absmax / 127


FORMATS[DENSE] = Format(
    copy_rows,
    lambda x, parts, width, transposed, epilogue, dtype: native.product(
        x, parts[0], transposed, epilogue, dtype
    ),
    product_on_cpu=lambda dtype, columns: dtype == torch.bfloat16,
    int8_rows=int8_rows_of_dense,
    fp8_values=lambda device: None,
)
