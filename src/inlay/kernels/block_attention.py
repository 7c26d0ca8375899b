"""Causal attention of short rows, a block of queries after another, by ordinary products.

Queries that share keys are multiplied together, and no product goes beyond the block's own keys.
On a CPU this is faster than the flash kernel from `BLOCK` to `LONGEST` tokens, where query heads
share keys or are `WIDE`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 64
LONGEST = 512
WIDE = 128
"""The width of a head from which its products alone are large enough."""


def blocks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def grouped(x: Tensor, batch: int) -> Tensor:
    """Return (b, heads, n, d) as (b kv, heads / kv * n, d): queries grouped by their keys."""
    return x.reshape(batch, -1, x.shape[-1])


def weights(query: Tensor, key: Tensor, span: slice, scale: float) -> Tensor:
    """Return the attention weights of a block, (b kv, heads / kv * n, stop)."""
    logits = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
    size = span.stop - span.start
    later = torch.full((size, size), -torch.inf, dtype=logits.dtype).triu_(1)
    logits.unflatten(1, (-1, size))[..., span].add_(later)
    return torch.softmax(logits, -1)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return `softmax(s q k.T) v`, (b, heads, s, v's d); k, v: (b, kv heads, s, their own d)."""
    key, value = k.flatten(0, 1), v.flatten(0, 1)
    by_token = (q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    out = q.new_empty(by_token).transpose(1, 2)
    for span in blocks(q.shape[2]):
        part = q[:, :, span]
        p = weights(grouped(part, len(key)), key[:, : span.stop], span, scale)
        out[:, :, span] = torch.bmm(p, value[:, : span.stop]).view(*part.shape[:-1], -1)
    return out


def attended_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to q, k and v; g: (b, heads, s, v's d); weights are recomputed."""
    key, value = k.flatten(0, 1), v.flatten(0, 1)
    to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(key), torch.zeros_like(value)
    for span in blocks(q.shape[2]):
        part, seen = q[:, :, span], slice(0, span.stop)
        query, grad = grouped(part, len(key)), grouped(g[:, :, span], len(key))
        p = weights(query, key[:, seen], span, scale)
        to_v[:, seen].baddbmm_(p.transpose(1, 2), grad)
        to_p = torch.bmm(grad, value[:, seen].transpose(1, 2))
        to_logits = torch.ops.aten._softmax_backward_data(to_p, p, -1, p.dtype).mul_(scale)
        to_q[:, :, span] = torch.bmm(to_logits, key[:, seen]).view(part.shape)
        to_k[:, seen].baddbmm_(to_logits.transpose(1, 2), query)
    return to_q, to_k.view(k.shape), to_v.view(v.shape)
