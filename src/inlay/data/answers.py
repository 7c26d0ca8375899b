"""The last answer of a row as tokens: where it begins and ends, and a row that trains it alone."""

from __future__ import annotations

from dataclasses import replace

from inlay.data.tokens import Encoded, cut_to


def answer_start(row: Encoded) -> int:
    """Return the index at which the last stretch of trained tokens begins."""
    before = reversed(range(answer_end(row)))
    return next((i + 1 for i in before if not row.trained[i]), 0)


def answer_end(row: Encoded) -> int:
    """Return the index after the last trained token; a chat template may write more behind it."""
    return max((i + 1 for i, trained in enumerate(row.trained) if trained), default=0)


def answer_from(row: Encoded, start: int) -> Encoded:
    """Return the row up to its last trained token, with the tokens from `start` on trained."""
    end = answer_end(row)
    trained = [False] * start + [True] * (end - start)
    return replace(row, input_ids=row.input_ids[:end], trained=trained, length=end)


def shortened(row: Encoded, max_length: int) -> Encoded:
    found = cut_to(row, max_length)
    return replace(found, ends=row.ends and not found.truncated)
