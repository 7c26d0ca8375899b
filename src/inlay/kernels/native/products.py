"""Products in C that read a frozen weight as it is held, sums in fp32; with AVX-512.

Numbers are multiplied in fp32, or in bfloat16 on a CPU that has such arithmetic. A row of the
result depends on that row of x alone: neither on how many rows there are nor on the threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.kernels.epilogue import Epilogue, LowRank
from inlay.kernels.native.build import LEVELS, library, loaded
from inlay.kernels.native.calls import (
    BLOCK,
    CODES,
    OUTPUTS,
    NF4Parts,
    called,
    nf4_parts,
    sized,
    takes,
)
from inlay.kernels.scratch import cast

STRIP = 32
"""Columns that a product packs at once: WIDTH in product.h."""
DEPTHS = {torch.float32: 384, torch.bfloat16: 1024}
"""Rows of the weight that are multiplied before sums are written, as in product.h and halves.h."""
NEEDED = {torch.float32: "avx512", torch.bfloat16: "avx512_bf16"}
"""The lowest instruction set that multiplies numbers in a dtype."""
NF4, INT8 = 2, 3
"""Kinds of weights, numbered after the codes of fp32 and bfloat16, as in product.h."""
WIDE = (torch.float32,)


class ProductArguments(ctypes.Structure):
    """`struct product_args` of the C sources."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "absmax")),
        ("codes", NF4Parts),
        *((name, ctypes.c_void_p) for name in ("left", "right", "bias", "sums", "y")),
        *((name, ctypes.c_int) for name in ("x_dtype", "y_dtype", "kind", "arithmetic")),
        *((name, ctypes.c_int) for name in ("transposed", "right_transposed")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("m", "k", "n", "rank")),
        *((name, ctypes.c_int64) for name in ("rows", "strips", "across")),
    ]


def multiplies(dtype: torch.dtype = torch.float32) -> bool:
    if library() is None or dtype not in NEEDED:
        return False
    return LEVELS.index(loaded().level) >= LEVELS.index(NEEDED[dtype])


def keeps_sums(k: int, rank: int, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether a product of this depth keeps fp32 sums next to a result in bfloat16."""
    return k + rank > DEPTHS[dtype]


def product(
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    epilogue: Epilogue | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Return `x @ W`, or `x @ W.T`; x: (m, k), both fp32 or bfloat16; None if it cannot.

    `dtype`: what the numbers are multiplied in, to which they are rounded first.
    """
    weight, transposed = as_stored(weight, transposed)
    if not takes(OUTPUTS, weight):
        return None
    arguments = ProductArguments(kind=CODES[weight.dtype], weight=weight.data_ptr())
    return multiplied(arguments, x, weight.shape[not transposed], transposed, epilogue, dtype)


def nf4_product(
    x: Tensor,
    parts: Sequence[Tensor],
    width: int,
    transposed: bool,
    epilogue: Epilogue | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Return `x @ W`, or `x @ W.T`, of this width, for NF4 rows of whole blocks; x: (m, k)."""
    rows, columns = (width, x.shape[1]) if transposed else (x.shape[1], width)
    held = nf4_parts(parts, rows * columns) if columns % BLOCK == 0 else None
    if held is None:
        return None
    arguments = ProductArguments(kind=NF4, codes=held)
    return multiplied(arguments, x, width, transposed, epilogue, dtype)


def int8_product(
    x: Tensor,
    q: Tensor,
    absmax: Tensor,
    transposed: bool,
    epilogue: Epilogue | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Return `x @ W`, or `x @ W.T`, for int8 rows with an absmax each; x: (m, k)."""
    ready = takes((torch.int8,), q) and takes(WIDE, absmax) and sized(len(q), absmax)
    if not ready or q.shape[1] % STRIP:
        return None
    arguments = ProductArguments(kind=INT8, weight=q.data_ptr(), absmax=absmax.data_ptr())
    return multiplied(arguments, x, q.shape[not transposed], transposed, epilogue, dtype)


def as_stored(weight: Tensor, transposed: bool) -> tuple[Tensor, bool]:
    if weight.t().is_contiguous() and not weight.is_contiguous():
        return weight.t(), not transposed
    return weight, transposed


def multiplied(
    a: ProductArguments,
    x: Tensor,
    width: int,
    transposed: bool,
    epilogue: Epilogue | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """Multiply x by the weight that the arguments name; None where C cannot read x."""
    end = epilogue or Epilogue(torch.float32)
    if not (takes(OUTPUTS, x) and multiplies(dtype) and x.numel() and width):
        return None
    a.m, a.k, a.n = *x.shape, width
    if end.term is not None and not add_term(a, end.term):
        return None
    y = x.new_empty(a.m, width, dtype=end.dtype if end.dtype in OUTPUTS else torch.float32)
    a.x, a.y, a.sums, a.transposed = x.data_ptr(), y.data_ptr(), y.data_ptr(), transposed
    a.x_dtype, a.y_dtype, a.arithmetic = CODES[x.dtype], CODES[y.dtype], CODES[dtype]
    sums = None
    if y.dtype != torch.float32 and keeps_sums(a.k, a.rank, dtype):
        sums = x.new_empty(y.shape, dtype=torch.float32)
        a.sums = sums.data_ptr()
    bias = None if end.bias is None else cast(end.bias, torch.float32)
    if bias is not None:
        a.bias = bias.data_ptr()
    return cast(y, end.dtype) if called("inlay_product", ctypes.byref(a)) else None


def add_term(a: ProductArguments, term: LowRank) -> bool:
    right, transposed = as_stored(term.right, False)
    a.left, a.right, a.right_transposed = term.left.data_ptr(), right.data_ptr(), transposed
    a.scale, a.rank = term.scale, term.left.shape[1]
    return takes(WIDE, term.left, right)
