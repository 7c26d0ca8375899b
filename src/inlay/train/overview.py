"""What `inlay data` shows of rows: counts, lengths, lines worth a look, and some rows in pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from inlay.data.inputs import InputRow
from inlay.data.rows import Rows
from inlay.data.summary import Piece, Summary
from inlay.train.rows import RunRows

Row = TypeVar("Row")


@dataclass(frozen=True)
class TextRows:
    """Rows that a language model is trained on."""

    in_words: str
    parts: Mapping[str, Summary]
    """The part, with the side where rows have several -> its counts and lengths."""
    shown: Sequence[RowShown]
    cut: bool = True
    """Whether longer rows are cut, and not refused."""
    also: Sequence[str] = ()
    """Further sentences, such as one a reward."""


@dataclass(frozen=True)
class RowShown:
    """One row: where it stands, each side token by token, and its columns beside these."""

    where: str
    sides: Mapping[str, Sequence[Piece]]
    columns: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True)
class LabelPart:
    """One part of a split, as a model with a head reads it."""

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
class LabelledRows:
    """Rows that a model with a head is trained on."""

    kind: str
    longest: int
    """Tokens that a row may have."""
    parts: dict[str, LabelPart]
    examples: list[Example]


Overview = TextRows | LabelledRows


def parts_of(rows: RunRows) -> dict[str, Rows]:
    parts = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    return {name: part for name, part in parts.items() if len(part)}


def label_part(
    encoded: Sequence[Row],
    lines: Sequence[int],
    texts: Callable[[Row], Sequence[InputRow]],
    labels: Iterable[str] = (),
) -> LabelPart:
    """Return the counts and lengths of rows, each of one text or several."""
    every = [list(texts(row)) for row in encoded]
    lengths = [text.length for row in every for text in row]
    pairs = zip(every, lines, strict=True)
    return LabelPart(
        rows=len(lines),
        tokens=sum(len(text.input_ids) for row in every for text in row),
        median=int(np.median(lengths)),
        p95=int(np.quantile(lengths, 0.95)),
        longest=max(lengths),
        cut=[line for row, line in pairs if any(text.truncated for text in row)],
        labels=dict(Counter(labels).most_common()),
    )
