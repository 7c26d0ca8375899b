"""The loss of each held-out row over its trained tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from inlay.data.padding import pad, rounded_up
from inlay.errors import DataError, ModelError
from inlay.kernels.loss import most_rows
from inlay.methods.base import evaluating
from inlay.model.fast.packing import mixes_rows, positions
from inlay.model.fast.padding import length_multiple
from inlay.model.load.causal import check_one_text

PADDING = 0

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


class EncodedRow(Protocol):
    """A tokenised row."""

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def trained(self) -> Sequence[bool]: ...


@dataclass(frozen=True)
class RowLoss:
    """One row's negative log-likelihood in nats, summed over its trained tokens."""

    tokens: int
    nll: float

    @property
    def per_token(self) -> float:
        """The mean over the row's trained tokens, in nats."""
        return self.nll / self.tokens


def losses(
    model: nn.Module,
    encoded: Sequence[EncodedRow],
    batch_size: int = 8,
    *,
    lines: Sequence[int] | None = None,
    join: Join | None = None,
    on_progress: Progress | None = None,
) -> list[RowLoss]:
    """Return the loss of each row, in order; the model's training mode does not change.

    Args:
        model: a causal language model whose forward gives `.logits`.
        encoded: the rows; the first token of a row has no context and is never measured.
        batch_size: rows of similar length in one forward pass, joined without padding where the
            model keeps rows apart, else padded on the right.
        lines: the line of each row in its file, for error messages; default: 1, 2, ...
        join: the collator of a batch, instead of joining or padding.
        on_progress: called after each batch with (rows done, rows in all).

    Raises:
        DataError: a row has no token to measure.
        ModelError: a row's loss is not finite, or the model is an encoder-decoder.
    """
    if not encoded:
        return []
    check_one_text(type(model).__name__, getattr(model, "config", None))
    named = list(lines) if lines is not None else list(range(1, len(encoded) + 1))
    check_measurable(encoded, named)
    found: dict[int, RowLoss] = {}
    if join is None:
        packed = mixes_rows(model, [row.input_ids for row in encoded]) is None
        join = joined if packed else padded
    with evaluating(model), torch.no_grad():
        for batch in batches(encoded, batch_size, most_rows(vocabulary(model))):
            rows = [encoded[i] for i in batch]
            found.update(zip(batch, batch_losses(model, rows, join), strict=True))
            check_finite(found, batch, named)
            if on_progress is not None:
                on_progress(len(found), len(encoded))
    return [found[i] for i in range(len(encoded))]


def buckets(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, longest first: memory runs out early or never."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def batches(encoded: Sequence[EncodedRow], batch_size: int, most: int) -> Iterator[list[int]]:
    for bucket in buckets([len(row.input_ids) for row in encoded], batch_size):
        batch, held = [bucket[0]], sum(encoded[bucket[0]].trained[1:])
        for i in bucket[1:]:
            count = sum(encoded[i].trained[1:])
            if held + count > most:
                yield batch
                batch, held = [], 0
            batch.append(i)
            held += count
        yield batch


def vocabulary(model: nn.Module) -> int:
    """Return the vocabulary size; 1 where the configuration does not give it."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config().vocab_size if config is not None else 1


def batch_losses(model: nn.Module, rows: Sequence[EncodedRow], join: Join) -> list[RowLoss]:
    batch = join(rows, length_multiple(model))
    where = batch.measured.nonzero(as_tuple=True)
    logits = logits_at(model, batch.call, *where)
    expected = batch.call["input_ids"][where[0], where[1] + 1].to(logits.device)
    most = most_rows(logits.shape[1])
    nll = torch.cat(
        [
            cross_entropy(part.float(), target, reduction="none")
            for part, target in zip(logits.split(most), expected.split(most), strict=True)
        ]
    )
    owner = batch.owner[where]
    summed = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owner, nll.double().cpu())
    counts = owner.bincount(minlength=len(rows)).tolist()
    return [RowLoss(int(n), float(s)) for n, s in zip(counts, summed.tolist(), strict=True)]


@dataclass(frozen=True)
class Batch:
    """The arguments of one forward pass; `measured` and `owner` have the shape of input_ids."""

    call: dict[str, Tensor]
    measured: Tensor
    """Whether the token after each position is measured."""
    owner: Tensor
    """The index of the row that each position belongs to."""


Join = Callable[[Sequence[Any], int], Batch]
"""A collator: (rows, multiple that lengths are rounded up to) -> batch."""


def padded(rows: Sequence[EncodedRow], multiple: int) -> Batch:
    ids = pad([row.input_ids for row in rows], PADDING, multiple)
    mask = pad([[1] * len(row.input_ids) for row in rows], 0, multiple)
    return Batch(
        {"input_ids": ids, "attention_mask": mask},
        pad([targets(row, len(row.input_ids)) for row in rows], False, multiple),
        torch.arange(len(rows))[:, None].expand(-1, ids.shape[1]),
    )


def joined(rows: Sequence[EncodedRow], multiple: int) -> Batch:
    """Collate rows into one sequence without padding; positions restart at 0 in each row."""
    lengths = [len(row.input_ids) for row in rows]
    whole = rounded_up(sum(lengths), multiple)
    lengths.append(whole - sum(lengths))
    ids = [token for row in rows for token in row.input_ids] + [PADDING] * lengths[-1]
    measured = [each for row in rows for each in targets(row, len(row.input_ids))]
    return Batch(
        {"input_ids": torch.tensor([ids]), "position_ids": positions(lengths)},
        torch.tensor([measured + [False] * lengths[-1]]),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None],
    )


def targets(row: EncodedRow, length: int) -> list[bool]:
    """Return for each position whether the token after it is trained on."""
    return [*row.trained[1:]] + [False] * (length - len(row.input_ids) + 1)


def logits_at(model: nn.Module, inputs: dict[str, Tensor], row: Tensor, position: Tensor) -> Tensor:
    """Return the logits (n, vocabulary) at n positions; the model skips the others if it can."""
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    call: dict[str, Any] = {name: x.to(device) for name, x in inputs.items()}
    if "use_cache" in accepted:
        call["use_cache"] = False
    if "logits_to_keep" not in accepted:
        return model(**call).logits[row, position]
    kept, column = position.unique(return_inverse=True)
    return model(**call, logits_to_keep=kept.to(device)).logits[row, column]


def check_measurable(encoded: Sequence[EncodedRow], lines: Sequence[int]) -> None:
    for row, line in zip(encoded, lines, strict=True):
        if not any(row.trained[1:]):
            raise DataError(
                f"the row of line {line} has no token to measure: every token is masked or cut; "
                f"raise max_length, or give the row a completion"
            )


def check_finite(found: dict[int, RowLoss], batch: Sequence[int], lines: Sequence[int]) -> None:
    for i in batch:
        if not math.isfinite(found[i].nll):
            raise ModelError(
                f"the model gives a loss of {found[i].nll} on the row of line {lines[i]}; expected "
                f"a finite number: its weights or adapter are not finite, or its dtype overflows "
                f"(try dtype bfloat16 or float32)"
            )
