"""Causal attention over the segments of a batch: rows, or rows packed one behind another.

A segment is `(row, start, stop)`; attention never leaves it, and what lies in no segment (padding)
is zero. The cost is the sum of the segments' squares, and no mask is built. Kept for the gradient
are q, k, v as the model made them (keys and values not repeated for the heads that share them),
the output and one number a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.scratch import product_dtype

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def spans(segments: Tensor, rows: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Every segment as (rows, positions); whole rows of a batch together."""
    listed: list[list[int]] = segments.tolist()
    if listed == [[row, 0, length] for row in range(rows)]:
        yield slice(0, rows), slice(0, length)
        return
    for row, start, stop in listed:
        yield slice(row, row + 1), slice(start, stop)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads (b, kv, s, d) for the query heads that share them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


@torch.library.custom_op("inlay::segment_attention", mutates_args=())
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return `softmax(s q k.T) v` in segments, (b, s, heads, d), and log-sums (b, heads, s).

    q: (b, heads, s, d); k, v: (b, kv heads, s, d); segments: (n, 3) integers.
    """
    batch, heads, length, width = q.shape
    dtype = product_dtype(q)
    out = q.new_zeros(batch, length, heads, width)
    sums = q.new_zeros(batch, heads, length, dtype=torch.promote_types(dtype, torch.float32))
    for row, span in spans(segments, batch, length):
        query, key, value = (
            repeated(x[row, :, span].to(dtype), heads).contiguous() for x in (q, k, v)
        )
        part, part_sums = flash(query, key, value, is_causal=True, scale=scale)
        out[row, span] = part.transpose(1, 2)
        sums[row, :, span] = part_sums
    return out, sums


@torch.library.custom_op("inlay::segment_attention_backward", mutates_args=())
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
    """Return the gradients to q, k and v; the weights are computed again."""
    batch, heads, length, _ = q.shape
    dtype = product_dtype(q)
    to_q, to_k, to_v = (x.new_zeros(x.shape) for x in (q, k, v))
    for row, span in spans(segments, batch, length):
        query, key, value = (
            repeated(x[row, :, span].to(dtype), heads).contiguous() for x in (q, k, v)
        )
        grad, part = (x[row, span].transpose(1, 2).to(dtype).contiguous() for x in (g, out))
        part_sums = sums[row, :, span].contiguous()
        found = flash_backward(grad, query, key, value, part, part_sums, 0.0, True, scale=scale)
        for to, x in zip((to_q, to_k, to_v), found, strict=True):
            kept = to.shape[1]
            shared = x if kept == heads else x.unflatten(1, (kept, heads // kept)).sum(2)
            to[row, :, span] = shared
    return to_q, to_k, to_v


@segment_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(batch, length, heads, width), q.new_empty(batch, heads, length, dtype=dtype)


@segment_attention_backward.register_fake
def _(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep q, k, v, the output and the log-sums."""
    q, k, v, segments, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, segments)


def gradient(ctx: Any, g: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Return the gradients to q, k and v."""
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
