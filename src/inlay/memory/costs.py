"""What operations do that their inputs and outputs do not show: scratch memory and arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from inlay.kernels import block_attention, native
from inlay.kernels.attention import in_blocks
from inlay.kernels.eight_bits import PREFIX as EIGHT_BITS
from inlay.kernels.frozen import DENSE, FEWEST_ROWS, reads_on_cpu
from inlay.kernels.loss import PART, PART_ROWS, by_parts, rows_at_once
from inlay.kernels.scratch import FAST_HALVES_ON_CPU, HALVES, TILE_BYTES, product_dtype, tile_rows

UNPACKING = (4 << 20, 4 << 20, 2 << 20)
"""About what unpacking a chunk of a packed weight holds on the way."""


def frozen_product(
    x: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int, *rest: Any
) -> int:
    """Two operations a weight and row of x."""
    del parts, packing, rest
    return 2 * (x.numel() // x.shape[-1]) * rows * columns


target: Literal["cpu", "cuda"] = "cpu"
"""The kind of device that is planned for; fake tensors say `cpu` whatever it is."""


@contextmanager
def planning_for(kind: Literal["cpu", "cuda"]) -> Generator[None]:
    """Count scratch memory as on this kind of device inside the `with` block."""
    global target
    before, target = target, kind
    try:
        yield
    finally:
        target = before


@dataclass(frozen=True)
class Scratch:
    """What an operation holds beside its inputs and outputs."""

    passing: tuple[int, ...] = ()
    """Bytes of the blocks that are freed when it ends."""
    kept: int = 0
    """Bytes of the buffer that is kept from one operation to the next."""
    multiplied: tuple[int, int, int] | None = None
    """The shape (m, k, n) of the float32 products inside: the library that multiplies keeps
    buffers of its own for them."""


def product(
    x: Tensor,
    rows: int,
    columns: int,
    packing: str,
    inputs: tuple[int, ...],
    output: int,
    rank: int = 0,
    back: bool | None = False,
) -> Scratch:
    """Return the scratch of a frozen product, with a low-rank term of this rank.

    Where x is multiplied in another dtype, it holds for every row of x: blocks of the widths of
    its inputs, unless they are read as they are, and the sums of its output.
    `back`: whether it is `g @ W`, or, with None, no product at all.
    """
    prefix, _, name = packing.rpartition(":")
    dtype = product_dtype(x) if target == "cpu" else x.dtype
    count = x.numel() // x.shape[-1]
    in_8_bits = target == "cpu" and prefix == EIGHT_BITS and (back or columns <= rows)
    reads = target == "cpu" and reads_on_cpu(name, x, columns)
    as_is = reads and x.dtype in native.OUTPUTS
    depth = rows if back else columns
    sums = output if in_8_bits or not as_is or native.keeps_sums(depth, rank, dtype) else 0
    widths = (*(() if as_is else inputs), rank, sums)
    wide = torch.float32 if reads else dtype
    cast = () if wide == x.dtype else tuple(count * w * wide.itemsize for w in widths)
    if in_8_bits:
        return Scratch((*cast, *in_int8(count, rows, columns, back)))
    if name == DENSE and dtype == x.dtype and not reads:
        return Scratch(cast, multiplied=(count, columns, rows))
    if reads:
        return Scratch(cast)
    unpacking = () if name == DENSE else UNPACKING
    step = tile_rows(rows, columns, dtype, torch.device(target))
    if target != "cpu":
        return Scratch((*unpacking, step * columns * dtype.itemsize))
    kept = max(step * columns * dtype.itemsize, TILE_BYTES)
    return Scratch((*cast, *unpacking), kept, (count, columns, step))


def in_int8(count: int, rows: int, columns: int, back: bool | None) -> tuple[int, ...]:
    """Return the blocks of an int8 product: a tile of the weight, the codes of x, the sums."""
    if back is None:
        return ()
    step = tile_rows(rows, columns, torch.int8, torch.device("cpu"))
    if not back:
        return (step * columns, count * columns, 4 * count * step)
    return (step * columns, 4 * count * step, count * step, *[4 * count * columns] * 2)


def frozen_linear(
    x: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int
) -> Scratch:
    """Scratch of `x @ W.T`."""
    del parts
    return product(x, rows, columns, packing, (columns,), rows)


def frozen_linear_t(
    g: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int
) -> Scratch:
    """Scratch of `g @ W`."""
    del parts
    return product(g, rows, columns, packing, (rows,), columns, back=True)


def low_rank(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    parts: Sequence[Tensor],
    packing: str,
    rows: int,
    columns: int,
) -> Scratch:
    """Scratch of the product with its low-rank term."""
    del b, bias, scale, parts
    return product(x, rows, columns, packing, (columns,), rows, a.shape[0])


def low_rank_backward(
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
) -> Scratch:
    """Scratch of the gradients: x and g are read, and the gradient to x is summed."""
    del g, b, scale, parts
    back, output = (True, columns) if to_x else (None, 0)
    return product(x, rows, columns, packing, (columns, rows), output, a.shape[0], back)


def low_rank_product(
    x: Tensor, a: Tensor, b: Tensor, bias: Any, scale: float, parts: Any, packing: str, *shape: int
) -> int:
    """Two operations a weight, the factors' included, and row of x."""
    del b, bias, scale, parts, packing
    rows, columns = shape
    return 2 * (x.numel() // columns) * (rows * columns + a.shape[0] * (rows + columns))


def low_rank_gradients(
    g: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    parts: Any,
    packing: str,
    rows: int,
    columns: int,
    to_x: bool,
) -> int:
    """The frozen product when x has a gradient, and six products with the factors."""
    del g, b, scale, parts, packing
    count = x.numel() // columns
    return 2 * count * (to_x * rows * columns + 3 * a.shape[0] * (rows + columns))


def matmul(a: Tensor, b: Tensor) -> Scratch:
    """Scratch of `a @ b`: in float32, where a CPU has no arithmetic for halves."""
    (m, k), n = a.shape, b.shape[-1]
    return replace(emulated(a, m * n), multiplied=(m, k, n))


def addmm(bias: Tensor, a: Tensor, b: Tensor, **factors: Any) -> Scratch:
    """Scratch of `bias + a @ b`."""
    del bias, factors
    return matmul(a, b)


def emulated(x: Tensor, outputs: int) -> Scratch:
    """Return what a product of halves holds: its result in float32, if the CPU emulates them."""
    half = x.dtype in HALVES
    native = target != "cpu" or x.dtype in FAST_HALVES_ON_CPU
    return Scratch((4 * outputs,) if half and not native else ())


def scored(
    h: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    to_gradient: bool,
    temperature: float,
    parts: Sequence[Tensor],
    packing: str,
    rows: int,
    columns: int,
) -> Scratch:
    """Scratch of the loss: logits of some rows, which C overwrites, and the gradient to them."""
    del labels, bias, temperature, parts
    if target == "cpu" and by_parts(h, packing):
        return scored_by_parts(h, to_gradient, packing, rows, columns)
    count = rows_at_once(h.shape[0], rows)
    some = h.new_empty(count, columns)
    output = columns if to_gradient else 0
    head = product(some, rows, columns, packing, (columns,), output, back=to_gradient)
    dtype = product_dtype(h) if target == "cpu" else h.dtype
    halves = 0 if dtype.itemsize >= 4 else 2
    wide = 1 if target == "cpu" and native.available() else 2
    blocks = (*head.passing, *[4 * count * rows] * wide, *[2 * count * rows] * halves)
    return Scratch(blocks, head.kept, head.multiplied)


def scored_by_parts(h: Tensor, to_gradient: bool, packing: str, rows: int, columns: int) -> Scratch:
    """Scratch of the loss by parts: some rows' logits and terms of a part, and rows of sums."""
    some = h.new_empty(min(max(h.shape[0], FEWEST_ROWS), PART_ROWS), columns)  # as it is read
    count, part = some.shape[0], min(rows, PART)
    head = product(some, part, columns, DENSE, (columns,), columns if to_gradient else 0)
    dtype = product_dtype(h)
    sums = 4 * count * columns if to_gradient else 0
    terms = dtype.itemsize if to_gradient else 4
    passing = (*head.passing, 4 * count * part, terms * count * part, *[sums] * 3)
    kept = 0 if packing == DENSE else max(part * columns * dtype.itemsize, TILE_BYTES)
    return Scratch(passing, max(head.kept, kept), head.multiplied)


def attended(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> Scratch:
    """Scratch of attention in segments: q, k, v and the output in the dtype of the product."""
    del v, scale
    return Scratch(attention_blocks(q, k, segments, queries=2, keys=2, weights=2))


def attended_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    segments: Tensor,
    scale: float,
) -> Scratch:
    """Scratch of its gradient: the same with the output's gradient, and the three gradients."""
    del g, v, out, sums, scale
    return Scratch(attention_blocks(q, k, segments, queries=4, keys=4, weights=3))


def attention_blocks(
    q: Tensor, k: Tensor, segments: Tensor, queries: int, keys: int, weights: int
) -> tuple[int, ...]:
    """Return the blocks that are held while a segment is attended to; q, k: (b, heads, s, d).

    queries, keys: how many there are of the shape of each; weights: for a block of queries, where
    rows are short. Otherwise keys are repeated for the queries that share them.
    """
    batch, heads, length, width = q.shape
    shared = k.shape[1]
    known: Tensor | None = getattr(segments, "known", None)
    if known is not None and known.shape[0] != batch:
        with _disable_current_modes():
            batch, length = 1, int((known[:, 2] - known[:, 1]).max())
    size = (product_dtype(q) if target == "cpu" else q.dtype).itemsize
    token = batch * length * width * size
    if target == "cpu" and in_blocks(q.new_empty(batch, heads, length, width), k):
        each = batch * heads * min(block_attention.BLOCK, length) * length * size
        return (token * heads,) * queries + (token * shared,) * keys + (each,) * weights
    return (token * heads,) * (queries + keys)


def loss_products(h: Tensor, labels: Tensor, bias: Any, to_gradient: bool, *rest: Any) -> int:
    """The head's product, and with a gradient a second one."""
    del labels, bias
    rows, columns = rest[-2:]
    return 2 * (1 + to_gradient) * h.shape[0] * rows * columns


def segment_products(q: Tensor, *rest: Any) -> int:
    """Half of the products of every query with every key, as causal attention needs."""
    del rest
    return attention_forward(q, q) // 2


def segment_gradients(g: Tensor, q: Tensor, *rest: Any) -> int:
    """Half of five such products."""
    del g, rest
    return attention_forward(q, q) * 5 // 4


def attention_forward(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
    """Two products of every query with every key; q: (b, heads, n, d), k: (b, heads, m, d)."""
    del rest, options
    batch, heads, length, width = q.shape
    return 4 * batch * heads * length * k.shape[-2] * width


def attention_backward(g: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
    """Five products of every query with every key."""
    del g, rest, options
    return attention_forward(q, k) * 5 // 2


SCRATCH: dict[str, Callable[..., Scratch]] = {
    "aten.mm": matmul,
    "aten.addmm": addmm,
    "inlay.linear_cross_entropy": scored,
    "inlay.segment_attention": attended,
    "inlay.segment_attention_backward": attended_backward,
    "inlay.frozen_linear": frozen_linear,
    "inlay.frozen_linear_t": frozen_linear_t,
    "inlay.low_rank_linear": low_rank,
    "inlay.low_rank_linear_backward": low_rank_backward,
}
"""Operation -> what it holds beside its inputs and outputs."""

FLOPS: dict[str, Callable[..., int]] = {
    "inlay.frozen_linear": frozen_product,
    "inlay.frozen_linear_t": frozen_product,
    "inlay.low_rank_linear": low_rank_product,
    "inlay.low_rank_linear_backward": low_rank_gradients,
    "inlay.linear_cross_entropy": loss_products,
    "inlay.segment_attention": segment_products,
    "inlay.segment_attention_backward": segment_gradients,
    "aten._scaled_dot_product_flash_attention_for_cpu": attention_forward,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": attention_backward,
}
"""Operation -> its arithmetic, where PyTorch's own counter does not know it."""
