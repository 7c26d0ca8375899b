"""Labelled rows: a prompt, an answer to it, and whether that answer is desirable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inlay.data.answers import answer_from, answer_start, shortened
from inlay.data.fields import EmptyFieldError, is_missing, joined, present, text_field
from inlay.data.preference import (
    answer_to,
    check_alike,
    check_columns,
    judged,
    messages,
    side_of,
)
from inlay.data.raw import RawRow
from inlay.data.rows import Rows, Shape
from inlay.data.tokens import Encoded, Reader, check_trained, encode_whole, named
from inlay.errors import DataError

FIELDS = ("prompt", "completion", "label")
TABLES = (".csv", ".tsv")
"""Files that hold text alone, so that a label is the word for it."""
WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Labelled:
    """A row as tokens: only the answer behind the prompt counts."""

    answer: Encoded
    desirable: bool

    @property
    def start(self) -> int:
        """The number of the prompt's tokens."""
        return self.answer.trained.index(True)


# Rows


def are_labelled(row: RawRow) -> bool:
    """Return whether a row looks labelled, and not supervised with a remark."""
    if any(name not in row.values for name in FIELDS):
        return False
    return len(row.values) == len(FIELDS) or isinstance(worded(row), bool)


def worded(row: RawRow) -> Any:
    """Return a row's label; a word for a truth value, which tables hold, is converted."""
    value = present(row, "label")
    if isinstance(value, str) and row.source.lower().endswith(TABLES):
        return WORDS.get(value.strip().lower(), value)
    return value


def normalise_labelled(
    raw: Sequence[RawRow],
    *,
    group: str | None = None,
    skip_empty: bool = False,
    allow_urls: bool = False,
) -> Rows:
    """Return rows of `prompt`, `completion` and `label`, every one checked.

    Prompt and completion are text, or lists of messages of which the completion is one, the
    assistant's; the label is true or false, in a table the word for it. Unless a group says
    otherwise, rows of one prompt stay on one side of a split. Where the first row has images, all
    may: see `judged`.

    Args:
        raw: the rows as read; at least one.
        group: a column whose equal values `split` keeps together, such as a patient's id.
        skip_empty: leave out rows with an empty field and list their lines in `skipped`.
        allow_urls: fetch images named by an http(s) address.
    """
    answers = ("completion",)
    rows = judged(raw, "labelled", label_shape, answers, group, skip_empty, allow_urls)
    return both_labels(rows)


def label_shape(first: RawRow, group: str | None) -> Shape:
    """Return what checks a row and brings it to a prompt, an answer and a label, like the first."""
    talks = isinstance(first.values.get("completion"), list)

    def checked(row: RawRow) -> dict[str, Any]:
        check_alike(row, first, ("completion",), talks)
        found = {**(conversation(row) if talks else text(row)), "label": label_of(row)}
        check_columns(row, FIELDS, group, "a labelled row")
        return found

    return checked


def both_labels(rows: Rows) -> Rows:
    """Return rows whose labels tell answers apart."""
    check_contradictions(rows)
    check_labels(rows)
    return rows


def text(row: RawRow) -> dict[str, Any]:
    return joined(text_field(row, "prompt"), text_field(row, "completion"))


def conversation(row: RawRow) -> dict[str, Any]:
    prompt, completion = messages(row, "prompt"), messages(row, "completion")
    return {"prompt": prompt, "completion": answer_to(row, prompt, "completion", completion)}


def label_of(row: RawRow) -> bool:
    """Return whether a row's answer is desirable."""
    value = worded(row)
    if is_missing(value):
        found = "blank" if isinstance(value, str) else "null"
        raise EmptyFieldError(
            f"{row.where}: 'label' is {found}; write true or false, or leave such rows out with "
            "skip_empty"
        )
    if not isinstance(value, bool):
        raise DataError(
            f"{row.where}: 'label' is {value!r}, of type {type(value).__name__}; expected true for "
            "a desirable answer or false for another"
        )
    return value


def check_labels(rows: Rows) -> None:
    """Raise when there is nothing to tell apart: one label, or one answer, for all rows."""
    labels = {row["label"] for row in rows.rows}
    if len(labels) == 1:
        only = str(labels.pop()).lower()
        raise DataError(
            f"{rows.source}: all {len(rows)} rows are labelled {only}, so that nothing tells "
            "desirable answers from others; give rows of both labels"
        )
    if len({row["completion"].strip() for row in rows.rows}) == 1:
        raise DataError(
            f"{rows.source}: all {len(rows)} rows have the same completion, so that no answer is "
            "better than another; give rows of different answers"
        )


def check_contradictions(rows: Rows) -> None:
    """Raise when the same answer to the same prompt has both labels."""
    seen: dict[str, int] = {}
    against: dict[int, int] = {}
    for index, row in enumerate(rows.rows):
        shown = [picture.sha256 for picture in row.get("images", [])]
        key = json.dumps([row["prompt"], shown, row["completion"].strip()], sort_keys=True)
        first = seen.setdefault(key, index)
        if rows.rows[first]["label"] != row["label"]:
            against[index] = first
    if against:
        first = rows.lines[next(iter(against.values()))]
        raise DataError(
            f"{named(rows, list(against))}: the same prompt and completion as in line {first}, "
            "with the other label; an answer is desirable or not, so take one of the two out"
        )


def by_label(rows: Rows) -> tuple[list[int], list[int]]:
    """Return the indices of the desirable rows, and of the others."""
    labels = [row["label"] for row in rows.rows]
    return [i for i, x in enumerate(labels) if x], [i for i, x in enumerate(labels) if not x]


def desirable_of(rows: Rows) -> Rows:
    """Return the rows with a desirable answer as supervised rows."""
    return side_of(rows.take(by_label(rows)[0]), "completion")


# Tokens


def encode_labelled(rows: Rows, reader: Reader, max_length: int) -> list[Labelled]:
    """Return the rows as tokens, cut at the end to `max_length`.

    An answer begins where the prompt alone and the row differ, as TRL's KTOTrainer has it.
    """
    (answers,) = encode_whole([side_of(rows, "completion")], reader, max_length)
    whole = [answer_from(row, answer_start(row)) for row in answers]
    check_trained(whole, rows, max_length)
    labels = [row["label"] for row in rows.rows]
    cut = [
        Labelled(shortened(row, max_length), label)
        for row, label in zip(whole, labels, strict=True)
    ]
    check_still_different(cut, rows, max_length)
    return cut


def check_still_different(cut: Sequence[Labelled], rows: Rows, max_length: int) -> None:
    """Raise when two rows with different labels are the same once they are cut."""
    seen: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate(cut):
        first = seen.setdefault(row.answer.identity, index)
        if cut[first].desirable != row.desirable:
            needed = max(row.answer.length, cut[first].answer.length)
            raise DataError(
                f"{rows.where(index)}: cut at max_length {max_length}, the row is the same as that "
                f"of line {rows.lines[first]}, with the other label; max_length {needed} keeps "
                "both whole"
            )


def beside(row: Labelled, other: Labelled, max_length: int) -> Encoded:
    """Return one row's prompt before another row's answer, cut as a row is."""
    return shortened(row.answer.followed_by(row.start, other.answer, other.start), max_length)
