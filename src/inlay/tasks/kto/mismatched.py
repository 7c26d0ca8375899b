"""Prompts with answers to other prompts, from which KTO estimates how far a model has gone."""

from __future__ import annotations

from collections.abc import Sequence

from inlay.data.tokens import Encoded
from inlay.tasks.kto.rows import Labelled, beside
from inlay.train.order import kept_order, neighbours


def mismatched_in_batches(
    rows: Sequence[Labelled], batch_size: int, seed: int, max_length: int
) -> list[Encoded]:
    """Return each row's prompt with the answer of the row before it in its training batch."""
    lengths = [len(row.answer.input_ids) for row in rows]
    before = neighbours(kept_order(lengths, batch_size, seed, 0), batch_size)
    return [beside(row, rows[before[i]], max_length) for i, row in enumerate(rows)]


def mismatched(rows: Sequence[Labelled], max_length: int) -> list[Encoded]:
    """Return each row's prompt with the answer of the row that is half of all rows away.

    Rows of one prompt often stand one after another. Of a single row there is none.
    """
    half = len(rows) // 2
    if half == 0:
        return []
    return [beside(row, rows[i - half], max_length) for i, row in enumerate(rows)]
