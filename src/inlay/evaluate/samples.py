"""Rows to generate text for: the prompt of each as tokens, and the answer that it should give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from inlay.data.picture import Picture
from inlay.data.rows import Rows
from inlay.errors import DataError
from inlay.evaluate.losses import EncodedRow


@dataclass(frozen=True)
class Sample:
    """A row to generate for: the tokens up to its last completion, and that completion's text."""

    row: int
    line: int
    prompt: tuple[int, ...]
    reference: str
    pictures: tuple[Picture, ...] = ()


def check_same_rows(rows: Rows, encoded: Sequence[EncodedRow]) -> None:
    if not encoded or not len(encoded) == len(rows.rows) == len(rows.lines):
        raise DataError(
            f"there are {len(rows.rows)} held-out rows and {len(encoded)} of them as tokens; "
            f"expected the same number, at least one: give more rows or another split"
        )


def choose_samples(
    rows: Rows, encoded: Sequence[EncodedRow], count: int, room: int | None = None
) -> tuple[Sample, ...]:
    """Spread up to `count` rows evenly over all; with `room`, only prompts of fewer tokens."""
    check_same_rows(rows, encoded)
    possible = [
        sample
        for number in range(len(encoded))
        if (sample := as_sample(rows, encoded[number], number)) is not None
        and (room is None or len(sample.prompt) < room)
    ]
    places = np.linspace(0, len(possible) - 1, min(count, len(possible))).round().astype(int)
    return tuple(possible[place] for place in places.tolist())


def as_sample(rows: Rows, encoded: EncodedRow, number: int) -> Sample | None:
    """Return a row's prompt, token for token as in training, and its reference; None for text."""
    row = rows.rows[number]
    reference, start = own_completion(row, encoded), completion_start(encoded)
    if reference is None or start == 0:
        return None
    prompt = tuple(encoded.input_ids[:start])
    pictures = tuple(row.get("images", ()))
    return Sample(number, rows.lines[number], prompt, reference.strip(), pictures)


def completion_start(row: EncodedRow) -> int:
    start = max((i + 1 for i, trained in enumerate(row.trained) if trained), default=0)
    while start > 0 and row.trained[start - 1]:
        start -= 1
    return start


def own_completion(row: Mapping[str, Any], encoded: EncodedRow) -> str | None:
    """Return the last completion of which tokens are left; an earlier message if cut off."""
    if "completion" in row:
        return row["completion"]
    said = [turn["content"] for turn in row.get("messages", ()) if turn["role"] == "assistant"]
    starts = sum(trained and not before for before, trained in pairwise([False, *encoded.trained]))
    return said[min(starts, len(said)) - 1] if said else None
