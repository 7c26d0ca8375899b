"""Causal attention over the segments of a batch: rows, or rows packed one behind another.

A segment is `(row, start, stop)`; attention never leaves it, and what lies in no segment (padding)
is zero. The cost is the sum of the segments' squares, and no mask is built. Kept for the gradient
are q, k, v as the model made them (keys and values not repeated for the heads that share them),
the output and one number a query. The kernel is chosen by length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from inlay.kernels import block_attention
from inlay.kernels.cost import Scratch, attention_forward, on_cpu, planned_dtype
from inlay.kernels.opaque import operator
from inlay.kernels.scratch import cast, product_dtype

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


STEP = 32
"""Lengths of halves that are attended to on a CPU are multiples of this."""


def spans(segments: Tensor, rows: int, length: int) -> list[tuple[slice, slice]] | None:
    """Return every segment as (rows, positions), or None where they are the batch's whole rows."""
    listed: list[list[int]] = segments.tolist()
    if listed == [[row, 0, length] for row in range(rows)]:
        return None
    return [(slice(row, row + 1), slice(start, stop)) for row, start, stop in listed]


def in_blocks(q: Tensor, k: Tensor) -> bool:
    """Return whether queries (b, heads, s, d) are attended to in blocks, where that is faster.

    One product must be large enough: of several queries to a key, or of wide heads.
    """
    exact = product_dtype(q) in (torch.float32, torch.float64)
    large = k.shape[1] < q.shape[1] or q.shape[3] >= block_attention.WIDE
    fits = block_attention.BLOCK < q.shape[2] <= block_attention.LONGEST
    return q.device.type == "cpu" and exact and large and fits


def ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x (b, heads, s, d) in the dtype and layout that the kernels read."""
    x = cast(x, dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def in_steps(x: Tensor) -> Tensor:
    """Return x (b, heads, s, d), where it is in halves filled up with zeros to whole STEPs of s.

    Causal queries see none of the keys that are added, and what is added to the queries has no
    gradient. oneDNN, which multiplies halves, keeps code for every length that it has met.
    """
    missing = -x.shape[2] % STEP if x.dtype.itemsize < 4 and x.device.type == "cpu" else 0
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads (b, kv, s, d) for the query heads that share them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def of_one_width(*tensors: Tensor) -> list[Tensor]:
    """Pad (..., d) tensors with zeros to the widest d: flash attention takes one width."""
    most = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == most else F.pad(x, (0, most - x.shape[-1])) for x in tensors]


def by_token(x: Tensor) -> Tensor:
    """Return an empty (b, heads, s, d) whose memory order is token by token, as layers make it."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def attended(qkv: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Return `softmax(s q k.T) v`, (b, s, heads, d), and log-sums (b, heads, s), 0 in blocks."""
    query, key, value = (ready(x, product_dtype(x)) for x in qkv)
    if in_blocks(*qkv[:2]):
        out = block_attention.attended(query, key, value, scale)
        return out.transpose(1, 2), query.new_zeros(query.shape[:-1])
    length, width = query.shape[2], value.shape[-1]
    query, key, value = map(in_steps, (query, key, value))
    key, value = (repeated(x, query.shape[1]) for x in (key, value))
    out, sums = flash(*of_one_width(query, key, value), is_causal=True, scale=scale)
    return out[:, :, :length, :width].transpose(1, 2), sums[:, :, :length]


def attended_backward(
    g: Tensor, qkv: list[Tensor], out: Tensor, sums: Tensor, scale: float
) -> Iterator[Tensor]:
    """Return the gradients to q, k and v, each (b, s, its heads, d); g, out: (b, s, heads, d)."""
    dtype = product_dtype(qkv[0])
    query, key, value, grad = (ready(x, dtype) for x in (*qkv, g.transpose(1, 2)))
    if in_blocks(*qkv[:2]):
        found = block_attention.attended_backward(grad, query, key, value, scale)
    else:
        length, part = query.shape[2], ready(out.transpose(1, 2), dtype)
        query, key, value, grad, part = map(in_steps, (query, key, value, grad, part))
        key, value = (repeated(x, query.shape[1]) for x in (key, value))
        wide = of_one_width(grad, query, key, value, part)
        sums = F.pad(sums, (0, query.shape[2] - length))
        found = flash_backward(*wide, sums, 0.0, True, scale=scale)
    for x, to in zip(qkv, found, strict=True):
        to = to[:, :, : x.shape[2], : x.shape[-1]]
        shared = to.shape[1] // x.shape[1]
        yield (to if shared == 1 else to.unflatten(1, (-1, shared)).sum(2)).transpose(1, 2)


@operator("segment_attention", lowers=3)
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return `softmax(s q k.T) v` in segments, (b, s, heads, d), and log-sums (b, heads, s).

    q: (b, heads, s, d); k: (b, kv heads, s, d); v: (b, kv heads, s, its own d); segments: (n, 3)
    integers.
    """
    batch, heads, length, _ = q.shape
    pieces = spans(segments, batch, length)
    if pieces is None:
        out, sums = attended([q, k, v], scale)
        return cast(out, q.dtype).contiguous(), sums.contiguous()
    out = q.new_zeros(batch, length, heads, v.shape[-1])
    wide = torch.promote_types(product_dtype(q), torch.float32)
    sums = q.new_zeros(batch, heads, length, dtype=wide)
    for row, span in pieces:
        there = [x[row, :, span] for x in (q, k, v)]
        out[row, span], sums[row, :, span] = attended(there, scale)
    return out, sums


@operator("segment_attention_backward")
def segment_attention_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, length, _ = q.shape
    pieces = spans(segments, batch, length)
    if pieces is None:
        found = attended_backward(g, [q, k, v], out, sums, scale)
        to_q, to_k, to_v = (cast(x, q.dtype).contiguous().transpose(1, 2) for x in found)
        return to_q, to_k, to_v
    to_q, to_k, to_v = (by_token(x).zero_() for x in (q, k, v))
    for row, span in pieces:
        there = [x[row, :, span] for x in (q, k, v)]
        here = (out[row, span], sums[row, :, span].contiguous())
        found = attended_backward(g[row, span], there, *here, scale)
        for to, part in zip((to_q, to_k, to_v), found, strict=True):
            to[row, :, span] = part.transpose(1, 2)
    return to_q, to_k, to_v


def empty_output(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    del k, segments, scale
    batch, heads, length, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    sums = q.new_empty(batch, heads, length, dtype=dtype)
    return q.new_empty(batch, length, heads, v.shape[-1]), sums


segment_attention.register_fake(empty_output)
segment_attention_backward.register_fake(
    lambda g, q, k, v, *rest: (by_token(q), by_token(k), by_token(v))
)


def scratch_blocks(
    q: Tensor, k: Tensor, segments: Tensor, queries: int, keys: int, weights: int
) -> Scratch:
    """Return the blocks that are held while a segment is attended to; q, k: (b, heads, s, d).

    queries, keys: how many blocks have the shape of each. weights: how many hold the weights of a
    block of queries, where rows are short. Longer rows repeat keys for the queries that share them.
    """
    batch, heads, length, width = q.shape
    shared = k.shape[1]
    known: Tensor | None = getattr(segments, "known", None)
    if known is not None and known.shape[0] != batch:
        with _disable_current_modes():
            batch, length = 1, int((known[:, 2] - known[:, 1]).max())
    size = planned_dtype(q).itemsize
    token = batch * length * width * size
    if on_cpu() and in_blocks(q.new_empty(batch, heads, length, width), k):
        each = batch * heads * min(block_attention.BLOCK, length) * length * size
        return Scratch((token * heads,) * queries + (token * shared,) * keys + (each,) * weights)
    return Scratch((token * heads,) * (queries + keys))


segment_attention.register_cost(
    lambda q, k, v, segments, scale: scratch_blocks(q, k, segments, 2, 2, 2),
    # Causal attention needs half of the products of every query with every key.
    lambda q, *rest: attention_forward(q, q) // 2,
)
segment_attention_backward.register_cost(
    lambda g, q, k, v, out, sums, segments, scale: scratch_blocks(q, k, segments, 4, 4, 3),
    lambda g, q, *rest: attention_forward(q, q) * 5 // 4,
)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, segments)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def gradient(ctx: Any, g: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    del unused
    return *segment_attention_backward(g, *ctx.saved_tensors, ctx.scale), None, None


segment_attention.register_autograd(gradient, setup_context=keep)


def segments_of(
    position_ids: Tensor | None, mask: Tensor | None, rows: int, length: int
) -> Tensor | None:
    """Return the segments of a batch, (n, 3): by padding if there is a mask, else by positions.

    None when a mask is anything but padding on the right.
    """
    if mask is not None:
        lengths = mask.long().sum(1)
        on_right = mask.bool() == (torch.arange(length, device=mask.device) < lengths[:, None])
        if mask.shape != (rows, length) or not bool(on_right.all()):
            return None
        return torch.stack([torch.arange(rows), torch.zeros_like(lengths), lengths], 1)
    if position_ids is None:
        row = torch.arange(rows)
        return torch.stack([row, torch.zeros_like(row), torch.full_like(row, length)], 1)
    positions = position_ids.expand(rows, length)
    begins = torch.ones(rows, length, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=1) != 1
    row, start = begins.nonzero(as_tuple=True)
    flat = torch.cat([row * length + start, torch.arange(rows * length, rows * length + 1)])
    return torch.stack([row, start, start + flat.diff()], 1)
