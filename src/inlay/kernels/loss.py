"""Output head and cross-entropy in one opaque operator: logits exist for a few at a time.

The head is frozen, so the gradient of each row's log-probability to its hidden state is computed
in the forward pass, while the row's logits are there; the backward pass only scales it. On a CPU
the head is read once, part by part of its vocabulary, and the logits of a part never leave the
cache: sums and gradient are those of exp(logit - highest so far), rescaled where that changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.cost import Scratch, on_cpu, planned_dtype
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.formats import DENSE, FEWEST_ROWS
from inlay.kernels.matrix import Matrix, matrix_of, product_scratch
from inlay.kernels.opaque import operator
from inlay.kernels.scratch import TILE_BYTES, cast, product_dtype

IGNORED = -100
"""The label of a position that no loss counts."""
LOGIT_BYTES = 160 << 20
"""Room for the logits of the rows that are scored at once, where those are whole."""
PART = 2048
"""Tokens in a part of the vocabulary: the same for all, so that a row does not depend on others."""
PART_ROWS = 512
"""Rows that are scored at once by parts."""


class Scores(NamedTuple):
    """The scores of positions, all (n,)."""

    log_probs: Tensor
    """Log-probability of the label; fp32."""
    entropy: Tensor
    """Entropy of the whole distribution; fp32, without gradient."""
    is_top1: Tensor
    """Whether the label is the likeliest token."""


def most_rows(vocabulary: int) -> int:
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
    if len(h) and by_parts(h, packing):
        native.check_labels(rows, labels)
        matrix = matrix_of(parts, packing, rows, columns, h)
        return scored_by_parts(matrix, h, labels, bias, to_gradient, temperature)
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


def by_parts(h: Tensor, packing: str) -> bool:
    return h.device.type == "cpu" and ":" not in packing and h.dtype != torch.float64


def scored_by_parts(
    matrix: Matrix,
    h: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    to_gradient: bool,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score hidden states by a head, PART_ROWS of them and PART tokens at a time."""
    back = torch.empty_like(h) if to_gradient else h.new_empty(0, matrix.columns)
    log_probs, entropy = torch.empty(len(h)), torch.empty(len(h))
    is_top1 = torch.empty(len(h), dtype=torch.bool)
    for start in range(0, len(h), PART_ROWS):
        some = slice(start, start + PART_ROWS)
        sums, others, at_label = pass_over_parts(
            matrix, h[some], labels[some], bias, to_gradient, temperature
        )
        distance = sums.at_label.double() - sums.highest
        total = sums.total + distance.exp()
        log_probs[some] = distance - total.log()
        entropy[some] = total.log() - (sums.weighted + distance.exp() * distance) / total
        is_top1[some] = sums.at_label >= sums.highest
        if to_gradient:
            rest = (sums.total / total / temperature)[:, None].float()
            share = (1 / total / temperature)[:, None].float()
            back[some] = at_label * rest - others * share
    return log_probs, entropy, is_top1, back


def pass_over_parts(
    matrix: Matrix,
    h: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    to_gradient: bool,
    temperature: float,
) -> tuple[native.LossSums, Tensor, Tensor]:
    """Return the sums of exp(logit - highest) over all tokens but the label, and rows of the head.

    The second, (n, in) and fp32, is the sum of those terms times the head's rows, the third the
    labels' rows; both are empty unless `to_gradient`.
    """
    sums = native.LossSums.start(len(h))
    shape = h.shape if to_gradient else (0, matrix.columns)
    others, at_label = (h.new_zeros(shape, dtype=torch.float32) for _ in range(2))
    flat = matrix.flat(h, matrix.columns)
    like = h if len(h) >= FEWEST_ROWS else h.new_empty(FEWEST_ROWS, matrix.columns)
    for first in range(0, matrix.rows, PART):
        tokens = slice(first, min(first + PART, matrix.rows))
        part = matrix.part(tokens, like)
        logits = part.times(
            flat, Epilogue(torch.float32, bias=None if bias is None else bias[tokens])
        )
        if temperature != 1.0:
            logits /= temperature
        terms = h.new_empty(logits.shape, dtype=part.dtype if to_gradient else torch.float32)
        scale = native.loss_part(logits, labels, first, sums, terms)
        if to_gradient:
            moved = part.times_t(terms, Epilogue(torch.float32))
            torch.addcmul(moved, others, scale[:, None], out=others)
            here = ((labels >= first) & (labels < tokens.stop)).nonzero().squeeze(1)
            at_label[here] = part.parts[0][labels[here] - first].float()
    return sums, others, at_label


def empty_scores(
    h: Tensor, labels: Any, bias: Any, to_gradient: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del labels, bias, rest
    each = h.new_empty(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32))
    back = torch.empty_like(h) if to_gradient else h.new_empty(0, h.shape[1])
    return each, torch.empty_like(each), torch.empty_like(each, dtype=torch.bool), back


linear_cross_entropy.register_fake(empty_scores)


def scores_scratch(
    h: Tensor, labels: Any, bias: Any, to_gradient: bool, temperature: float, parts: Any,
    packing: str, rows: int, columns: int,
) -> Scratch:  # fmt: skip
    """Scratch of the loss: logits of some rows, which C overwrites, and the gradient to them."""
    del labels, bias, temperature, parts
    if on_cpu() and by_parts(h, packing):
        return parts_scratch(h, to_gradient, packing, rows, columns)
    count = rows_at_once(h.shape[0], rows)
    some = h.new_empty(count, columns)
    output = columns if to_gradient else 0
    head = product_scratch(
        some, packing, rows, columns, inputs=(columns,), output=output, back=to_gradient
    )
    halves = 0 if planned_dtype(h).itemsize >= 4 else 2
    wide = 1 if on_cpu() and native.available() else 2
    blocks = (*head.passing, *[4 * count * rows] * wide, *[2 * count * rows] * halves)
    return Scratch(blocks, head.kept, head.multiplied)


def parts_scratch(h: Tensor, to_gradient: bool, packing: str, rows: int, columns: int) -> Scratch:
    """Scratch of the loss by parts: some rows' logits and terms of a part, and rows of sums."""
    some = h.new_empty(min(max(h.shape[0], FEWEST_ROWS), PART_ROWS), columns)  # as it is read
    count, part = some.shape[0], min(rows, PART)
    output = columns if to_gradient else 0
    head = product_scratch(some, DENSE, part, columns, inputs=(columns,), output=output)
    dtype = product_dtype(h)
    sums = 4 * count * columns if to_gradient else 0
    terms = dtype.itemsize if to_gradient else 4
    passing = (*head.passing, 4 * count * part, terms * count * part, *[sums] * 3)
    kept = 0 if packing == DENSE else max(part * columns * dtype.itemsize, TILE_BYTES)
    return Scratch(passing, max(head.kept, kept), head.multiplied)


def head_flops(h: Tensor, labels: Any, bias: Any, to_gradient: bool, *rest: Any) -> int:
    """The head's product, and with a gradient a second one."""
    del labels, bias
    rows, columns = rest[-2:]
    return 2 * (1 + to_gradient) * h.shape[0] * rows * columns


linear_cross_entropy.register_cost(scores_scratch, head_flops)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.count = len(inputs[5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3])


def gradient(ctx: Any, g: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    del unused
    (back,) = ctx.saved_tensors
    scaled = (back.to(g.dtype) * g[:, None]).to(back.dtype)
    return scaled, None, None, None, None, [None] * ctx.count, None, None, None


linear_cross_entropy.register_autograd(gradient, setup_context=keep)
