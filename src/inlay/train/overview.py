"""What `inlay data` shows of rows for a model with a head: counts, lengths, and some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from inlay.data.inputs import InputRow
from inlay.data.rows import Rows
from inlay.train.rows import RunRows

__all__ = ["Example", "Overview", "Part", "Reading", "example_of", "overview_of"]

Row = TypeVar("Row")


@dataclass(frozen=True)
class Part:
    """One part of a split, as training will see it."""

    rows: int
    tokens: int
    median: int
    p95: int
    longest: int
    cut: list[int]
    """Lines of the rows that lose tokens."""
    labels: dict[str, int] = field(default_factory=dict[str, int])
    """How often each class comes, the most frequent first."""


@dataclass(frozen=True)
class Example:
    """One row: where it stands, its pieces, and which of them are marked."""

    where: str
    pieces: list[str]
    marked: list[bool]
    answer: str


@dataclass(frozen=True)
class Overview:
    """The rows of a run."""

    kind: str
    longest: int
    """Tokens that a row may have."""
    parts: dict[str, Part]
    examples: list[Example]


@dataclass(frozen=True)
class Reading(Generic[Row]):
    """How a task reads its rows."""

    kind: str
    """What the rows are."""
    longest: int
    """Tokens that a text may have."""
    encode: Callable[[Rows], list[Row]]
    """Makes tokens of a part's rows."""
    texts: Callable[[Row], Sequence[InputRow]]
    """Names the texts of a row."""
    examples: Callable[[int, Row], Sequence[Example]]
    """Shows a training row of this number."""
    labels: Callable[[Rows], Iterable[str]] = lambda rows: ()
    """Names a part's classes, as often as they come."""


def overview_of(reading: Reading[Row], rows: RunRows, show: int) -> Overview:
    """Return counts and lengths of every part that has rows, and the first training rows."""
    parts = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    encoded = {name: reading.encode(part) for name, part in parts.items() if len(part)}
    summaries = {
        name: part_of(
            list(map(reading.texts, found)), parts[name].lines, reading.labels(parts[name])
        )
        for name, found in encoded.items()
    }
    first = enumerate(encoded["train"][:show])
    shown = [each for i, row in first for each in reading.examples(i, row)]
    return Overview(reading.kind, reading.longest, summaries, shown)


def part_of(
    encoded: Sequence[Sequence[InputRow]], lines: Sequence[int], labels: Iterable[str]
) -> Part:
    """Return the summary of rows, each of one text or several."""
    lengths = [text.length for row in encoded for text in row]
    cut = [
        line
        for row, line in zip(encoded, lines, strict=True)
        if any(text.truncated for text in row)
    ]
    return Part(
        rows=len(lines),
        tokens=sum(len(text.input_ids) for row in encoded for text in row),
        median=int(np.median(lengths)),
        p95=int(np.quantile(lengths, 0.95)),
        longest=max(lengths),
        cut=cut,
        labels=dict(Counter(labels).most_common()),
    )


def example_of(
    where: str,
    text: InputRow,
    tokenizer: PreTrainedTokenizerBase,
    answer: str,
    marked: Sequence[bool] | None = None,
) -> Example:
    """Return a text to look at, token by token; without marks, none is marked."""
    pieces = [str(tokenizer.decode([token])) for token in text.input_ids]
    return Example(where, pieces, list(marked or [False] * len(pieces)), answer)
