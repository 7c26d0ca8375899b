"""Output head and cross-entropy in one opaque operator: logits exist for a few rows at a time.

The head is frozen, so the gradient of each row's log-probability to its hidden state is computed
in the forward pass, while the row's logits are there; the backward pass only scales it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.frozen import matrix_of
from inlay.kernels.opaque import operator
from inlay.kernels.scratch import cast

LOGIT_BYTES = 160 << 20
"""Room for the logits of the rows that are scored at once."""


class Scores(NamedTuple):
    """What is known of each scored position, all (n,)."""

    log_probs: Tensor
    """Of the label; fp32."""
    entropy: Tensor
    """Of the whole distribution; fp32, without gradient."""
    is_top1: Tensor
    """Whether no token is likelier than the label."""


def most_rows(vocabulary: int) -> int:
    """Return how many rows of logits there is room for, in fp32."""
    return max(1, LOGIT_BYTES // (4 * vocabulary))


def rows_at_once(rows: int, vocabulary: int) -> int:
    """Return how many of these rows are scored at once: equal shares that fit the room."""
    most = most_rows(vocabulary)
    return max(1, math.ceil(rows / math.ceil(max(rows, 1) / most)))


@operator("linear_cross_entropy", lowers=1)
def linear_cross_entropy(
    h: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    to_gradient: bool,
    temperature: float,
    parts: Sequence[Tensor],
    packing: str,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score hidden states h (n, in) by a frozen head (vocabulary, in) and labels (n,).

    Returns log-probabilities, entropies and top-1 hits, all (n,), and the gradient of the
    log-probabilities to h, (n, in) in h's dtype, or (0, in) unless `to_gradient`. The logits are
    divided by the temperature first.
    """
    matrix = matrix_of(parts, packing, rows, columns, h)
    found: list[Scores] = []
    back = torch.empty_like(h) if to_gradient else h.new_empty(0, columns)
    to_logits = Epilogue(torch.promote_types(h.dtype, torch.float32), bias=bias)
    step = rows_at_once(h.shape[0], rows)
    for start in range(0, h.shape[0], step):
        part = slice(start, start + step)
        logits = matrix.times(matrix.flat(h[part], columns), to_logits)
        if temperature != 1.0:
            logits /= temperature
        found.append(Scores(*native.loss_tile(logits, labels[part])))
        if to_gradient:
            if temperature != 1.0:
                logits /= temperature
            back[part] = matrix.times_t(cast(logits, matrix.dtype), Epilogue(h.dtype))
        del logits
    if not found:
        empty = h.new_empty(0, dtype=torch.promote_types(h.dtype, torch.float32))
        return empty, empty.clone(), empty.bool(), back
    log_probs, entropy, is_top1 = (torch.cat(each) for each in zip(*found, strict=True))
    return log_probs, entropy, is_top1, back


@linear_cross_entropy.register_fake
def _(
    h: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    to_gradient: bool,
    temperature: float,
    parts: Sequence[Tensor],
    packing: str,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    each = h.new_empty(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32))
    back = torch.empty_like(h) if to_gradient else h.new_empty(0, columns)
    return each, torch.empty_like(each), torch.empty_like(each, dtype=torch.bool), back


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep each row's gradient, computed already."""
    ctx.count = len(inputs[5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3])


def gradient(ctx: Any, g: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    """Scale each row's gradient."""
    del unused
    (back,) = ctx.saved_tensors
    scaled = (back.to(g.dtype) * g[:, None]).to(back.dtype)
    return scaled, None, None, None, None, [None] * ctx.count, None, None, None


linear_cross_entropy.register_autograd(gradient, setup_context=keep)
