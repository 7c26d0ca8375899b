"""Validate rows and bring them to one of three shapes: text, prompt and completion, messages.

Rows of preferences are checked in `preference`, labelled ones in `labelled`, prompts alone in
`prompts`, those with classes in `labels`, pairs of texts in `similar`, and rows with images in
`images`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from inlay.data.conversations import messages_row, sharegpt_row
from inlay.data.fields import (
    EmptyFieldError,
    columns,
    filled,
    is_missing,
    joined,
    present,
    text_field,
)
from inlay.data.raw import RawRow, place
from inlay.errors import DataError, did_you_mean

Kind = str
"""What rows are: `text`, `prompt_completion`, `messages`, `images`, or a word of a task's own."""
Format = Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"]
Shape = Callable[[RawRow], dict[str, Any]]
LINES_NAMED = 5

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Rows:
    """Validated rows, all of one kind, with the line that each came from."""

    kind: Kind
    rows: list[dict[str, Any]]
    """`{"text"}`, `{"prompt", "completion"}`, `{"messages": [{"role", "content"}]}`, or
    `{"prompt", "chosen", "rejected"}` and `{"prompt", "completion", "label"}`, where the prompt may
    be messages and the answers one each; `{"prompt", ...}` with any further columns; of labels
    `{"text", "label"}` or `{"tokens", "tags"}`, of similar texts `{"anchor", ...}`; with images
    `{"messages", "images", "completion"}`.
    """
    lines: list[int]
    source: str
    sha256: str
    """Of the raw rows, all their columns, in order."""
    groups: list[str] | None = None
    """Each row's value of the group column."""
    skipped: list[int] = field(default_factory=list)
    """The lines left out because a field was empty."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing of how they were read."""
    pictured: bool = False
    """Whether they have images, which the model sees: `images`, and messages of parts."""

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Return `data.csv, line 3` for the row at this index."""
        return place(self.source, self.lines[index])

    def take(self, indices: Sequence[int]) -> Rows:
        return replace(
            self,
            rows=[self.rows[i] for i in indices],
            lines=[self.lines[i] for i in indices],
            groups=None if self.groups is None else [self.groups[i] for i in indices],
        )


def normalise(
    raw: Sequence[RawRow],
    *,
    prompt: str | None = None,
    completion: str | None = None,
    text: str | None = None,
    format: Format = "auto",
    group: str | None = None,
    skip_empty: bool = False,
) -> Rows:
    """Return the rows in TRL's shapes, every one checked.

    Args:
        raw: the rows as read; at least one.
        prompt: a column, or a template with columns in braces: `"Findings: {findings}"`.
        completion: a column or template; given together with `prompt`.
        text: a column or template to train on in full, instead of the two.
        format: the shape of the rows; auto recognises it by the first row's columns.
        group: a column whose equal values `split` keeps together, such as a patient's id.
        skip_empty: leave out rows with an empty field and list their lines in `skipped`.

    Raises:
        DataError: a column or format that is not there, a row of another shape, a field of the
            wrong type, an empty one, or a conversation that teaches nothing; names file and line.
    """
    if not raw:
        raise DataError("there are no rows; training needs at least one")
    kind, shape = shape_of(raw[0], prompt, completion, text, format)
    groups = None if group is None else lambda row, _: group_of(row, group)
    return shaped(raw, kind, shape, groups, skip_empty)


def shaped(
    raw: Sequence[RawRow],
    kind: Kind,
    shape: Shape,
    groups: Callable[[RawRow, dict[str, Any]], str] | None,
    skip_empty: bool,
) -> Rows:
    """Return every row in its shape, those with an empty field left out if that is asked for."""
    kept: list[int] = []
    rows: list[dict[str, Any]] = []
    skipped: list[int] = []
    for index, row in enumerate(raw):
        try:
            rows.append(shape(row))
            kept.append(index)
        except EmptyFieldError:
            if not skip_empty:
                raise
            skipped.append(row.line)
    if not rows:
        raise DataError(f"{raw[0].source}: all {len(raw)} rows have an empty field")
    return Rows(
        kind=kind,
        rows=rows,
        lines=[raw[i].line for i in kept],
        source=raw[0].source,
        sha256=digest(raw),
        groups=groups and [groups(raw[i], row) for i, row in zip(kept, rows, strict=True)],
        skipped=skipped,
    )


def first_lines(lines: Sequence[int]) -> str:
    return ", ".join(map(str, lines[:LINES_NAMED])) + (", ..." if len(lines) > LINES_NAMED else "")


def digest(raw: Sequence[RawRow]) -> str:
    """Return the SHA-256 of the rows' content, whatever file format held them."""
    found = hashlib.sha256()
    for row in raw:
        found.update(json.dumps(row.values, default=repr).encode() + b"\n")
    return found.hexdigest()


def group_of(row: RawRow, column: str) -> str:
    value = present(row, column)
    if is_missing(value) or not isinstance(value, str | int):
        found = "nothing" if is_missing(value) else type(value).__name__
        raise DataError(f"{row.where}: the group {column!r} holds {found}; expected text or an id")
    return str(value)


# Which shape


def shape_of(
    first: RawRow, prompt: str | None, completion: str | None, text: str | None, format: str
) -> tuple[Kind, Shape]:
    """Return what rows become, and the function that brings one there."""
    if prompt is not None or completion is not None or text is not None:
        return named_columns(first, prompt, completion, text, format)
    known = get_args(Format)
    if format not in known:
        near = did_you_mean(format, known)
        raise DataError(
            f"unknown data format {format!r}; expected one of {', '.join(known)}.{near}"
        )
    name = detect(first) if format == "auto" else format
    kind, shape = SHAPES[name]
    return kind, lambda row: alike(row, first, name, shape)


def named_columns(
    first: RawRow, prompt: str | None, completion: str | None, text: str | None, format: str
) -> tuple[Kind, Shape]:
    """Return the shape that named columns or templates ask for."""
    if format != "auto":
        raise DataError(f"format {format!r} and named columns exclude each other; give only one")
    if text is not None and (prompt is not None or completion is not None):
        raise DataError("text and prompt/completion exclude each other; name one or the other")
    if text is not None:
        return "text", lambda row: {"text": filled(row, text, first)}
    if prompt is None or completion is None:
        missing = "prompt" if prompt is None else "completion"
        raise DataError(f"prompt and completion go together; name the {missing} column too")
    return "prompt_completion", lambda row: joined(
        filled(row, prompt, first), filled(row, completion, first)
    )


MARKS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""The columns by which each format is recognised, in this order."""


def recognised(row: RawRow) -> str | None:
    """Return the format whose columns a row has, or None."""
    return next((n for n, marks in MARKS.items() if all(m in row.values for m in marks)), None)


def detect(first: RawRow) -> str:
    """Return the first row's format."""
    found = recognised(first)
    if found is None:
        known = "; ".join(" + ".join(marks) for marks in MARKS.values())
        raise DataError(
            f"{first.where}: the columns {columns(first)} are of no known format ({known}); "
            "name the columns to use with prompt and completion, or with text"
        )
    return found


def alike(row: RawRow, first: RawRow, name: str, shape: Shape) -> dict[str, Any]:
    """Return a row in its shape."""
    other = recognised(row)
    if other not in (name, None) and not all(mark in row.values for mark in MARKS[name]):
        raise DataError(
            f"{row.where}: a row of the format {other!r}, but {first.where} has {name!r}; "
            "all rows must be of one format"
        )
    return shape(row)


# One function a format


def text_row(row: RawRow) -> dict[str, Any]:
    return {"text": text_field(row, "text")}


def prompt_completion_row(row: RawRow) -> dict[str, Any]:
    return joined(text_field(row, "prompt"), text_field(row, "completion"))


def alpaca_row(row: RawRow) -> dict[str, Any]:
    """Return an Alpaca row with the prompt that Alpaca was published with."""
    for name in ("system", "history"):
        if row.values.get(name):
            raise DataError(f"{row.where}: Alpaca's prompt has no {name!r}; write it as messages")
    values = {"instruction": text_field(row, "instruction")}
    template = ALPACA
    if not is_missing(row.values.get("input")):
        values["input"] = text_field(row, "input")
        template = ALPACA_WITH_INPUT
    return joined(template.format(**values), text_field(row, "output"))


SHAPES: dict[str, tuple[Kind, Shape]] = {
    "text": ("text", text_row),
    "prompt_completion": ("prompt_completion", prompt_completion_row),
    "messages": ("messages", messages_row),
    "alpaca": ("prompt_completion", alpaca_row),
    "sharegpt": ("messages", sharegpt_row),
}
"""What a row of each format becomes, and how."""
