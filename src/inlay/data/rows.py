"""Validate rows and bring them to one of three shapes: text, prompt and completion, messages.

Rows of preferences are checked in `preference`, labelled ones in `labelled`, prompts alone in
`prompts`, those with classes in `labels`, pairs of texts in `similar`, and rows with images in
`images`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from string import Formatter
from typing import Any, Literal, get_args

from inlay.data.read import RawRow, place
from inlay.errors import DataError, did_you_mean

__all__ = ["Format", "Kind", "Rows", "normalise"]

Kind = Literal[
    "text", "prompt_completion", "messages", "preference", "labelled", "prompt", "images",
    "class", "classes", "number", "tags", "pairs", "triplets", "scored_pairs",
]  # fmt: skip
Format = Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"]
Shape = Callable[[RawRow], dict[str, Any]]

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class EmptyFieldError(DataError):
    """A row has nothing in a field that it needs; `skip_empty` leaves such rows out."""


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

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Return `data.csv, line 3` for the row at this index."""
        return place(self.source, self.lines[index])

    def take(self, indices: Sequence[int]) -> Rows:
        """Return only the rows at these indices."""
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
    """Return every row in its shape, those with an empty field left out if that is asked for.

    Raises:
        DataError: a row cannot be brought there, or all have an empty field.
    """
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


def digest(raw: Sequence[RawRow]) -> str:
    """Return the SHA-256 of the rows' content, whatever file format held them."""
    found = hashlib.sha256()
    for row in raw:
        found.update(json.dumps(row.values, default=repr).encode() + b"\n")
    return found.hexdigest()


def group_of(row: RawRow, column: str) -> str:
    """Return the value that decides which part of a split a row belongs to."""
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
    """Return the format whose columns a row has, if any."""
    return next((n for n, marks in MARKS.items() if all(m in row.values for m in marks)), None)


def detect(first: RawRow) -> str:
    """Return the first row's format.

    Raises:
        DataError: its columns are of no known format.
    """
    found = recognised(first)
    if found is None:
        known = "; ".join(" + ".join(marks) for marks in MARKS.values())
        raise DataError(
            f"{first.where}: the columns {columns(first)} are of no known format ({known}); "
            "name the columns to use with prompt and completion, or with text"
        )
    return found


def alike(row: RawRow, first: RawRow, name: str, shape: Shape) -> dict[str, Any]:
    """Return a row in its shape.

    Raises:
        DataError: it is a row of another format than the first.
    """
    other = recognised(row)
    if other not in (name, None) and not all(mark in row.values for mark in MARKS[name]):
        raise DataError(
            f"{row.where}: a row of the format {other!r}, but {first.where} has {name!r}; "
            "all rows must be of one format"
        )
    return shape(row)


# Fields


def columns(row: RawRow) -> str:
    """Return a row's columns as a list to read."""
    return ", ".join(repr(name) for name in row.values) or "(none)"


def is_missing(value: Any) -> bool:
    """Say whether a value is null, not a number, or blank."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def present(row: RawRow, name: str) -> Any:
    """Return a column's value.

    Raises:
        DataError: the row does not have it.
    """
    if name not in row.values:
        near = did_you_mean(name, row.values)
        raise DataError(f"{row.where}: no field {name!r}; the row has {columns(row)}.{near}")
    return row.values[name]


def text_in(row: RawRow, value: Any, name: str) -> str:
    """Return a value that must be text with something in it.

    Raises:
        EmptyFieldError: it is null, not a number, or blank.
        DataError: it is not text, or text that UTF-8 cannot hold.
    """
    if is_missing(value):
        found = "blank" if isinstance(value, str) else "null"
        raise EmptyFieldError(
            f"{row.where}: {name} is {found}; fill it in, or leave such rows out with skip_empty"
        )
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {name} is of type {type(value).__name__}; expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{row.where}: {name} holds half of a surrogate pair, which is not text")
    return value


def text_field(row: RawRow, name: str) -> str:
    """Return a column that must be text with something in it."""
    return text_in(row, present(row, name), repr(name))


def filled(row: RawRow, spec: str, first: RawRow) -> str:
    """Return the column of that name, or the template of that text with its columns filled in."""
    if spec in first.values or "{" not in spec:
        return text_field(row, spec)
    parts = template_parts(spec)
    return "".join(
        literal + ("" if name is None else text_field(row, name)) for literal, name in parts
    )


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Return a template as pairs of literal text and the column that follows it.

    Raises:
        DataError: a brace is open, or holds more than a column's name.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"the template {template!r} cannot be read: {error}; write {{column}}, and {{{{ for "
            "a brace"
        ) from error
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion):
            raise DataError(
                f"the template {template!r} may hold only columns in braces, such as {{findings}}"
            )
    return [(literal, name) for literal, name, _, _ in parts]


def joined(prompt: str, completion: str) -> dict[str, Any]:
    """Return a prompt and a completion that meet at a token's boundary.

    Tokenizers take a space as the start of the word that follows, so the one space between the
    two belongs to the completion; then the prompt alone is tokenised as it is within the row.
    """
    if completion[0].isspace() or prompt.endswith(("\n", "\r")):
        return {"prompt": prompt, "completion": completion}
    return {"prompt": prompt.rstrip(" "), "completion": f" {completion}"}


# One function a format


def text_row(row: RawRow) -> dict[str, Any]:
    """Return plain text."""
    return {"text": text_field(row, "text")}


def prompt_completion_row(row: RawRow) -> dict[str, Any]:
    """Return a prompt and its completion."""
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


def messages_row(row: RawRow) -> dict[str, Any]:
    """Return a conversation of roles and contents."""
    turns = turn_list(row, "messages")
    roles = {role: role for role in ROLES}
    return conversation(row, [turn(row, t, n, "role", "content", roles) for n, t in turns])


def sharegpt_row(row: RawRow) -> dict[str, Any]:
    """Return a ShareGPT conversation, its speakers renamed."""
    turns = turn_list(row, "conversations")
    if "role" in turns[0][1]:
        keys, roles = ("role", "content"), {role: role for role in ROLES}
    else:
        keys, roles = ("from", "value"), SHAREGPT_ROLES
    messages = [turn(row, t, n, *keys, roles) for n, t in turns]
    if not is_missing(row.values.get("system")):
        messages.insert(0, {"role": "system", "content": text_field(row, "system")})
    return conversation(row, messages)


def turn_list(row: RawRow, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Return a conversation's turns, numbered from 1.

    Raises:
        DataError: it is not a list of objects, or has tools, which are not supported.
    """
    value = present(row, name)
    if isinstance(value, str):
        value = None if is_missing(value) else parsed(value)
    if is_missing(value) or value == []:
        raise EmptyFieldError(f"{row.where}: {name!r} holds no messages")
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"{row.where}: {name!r} must be a list of objects, one a message")
    if row.values.get("tools"):
        raise DataError(f"{row.where}: tools are not supported; take the field 'tools' out")
    return list(enumerate(value, start=1))


def parsed(value: str) -> Any:
    """Return JSON that a table holds as text, or the text itself when it is none."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def turn(
    row: RawRow,
    value: Mapping[str, Any],
    number: int,
    role_key: str,
    content_key: str,
    roles: Mapping[str, str],
) -> dict[str, Any]:
    """Return one message.

    Raises:
        DataError: its role is unknown, its content no text, or it holds what would be lost.
    """
    named = f"message {number}"
    for key in (role_key, content_key):
        if key not in value:
            near = did_you_mean(key, value)
            raise DataError(f"{row.where}: {named} has no {key!r}.{near}")
    for key, extra in value.items():
        if key not in (role_key, content_key) and not (is_missing(extra) or extra == []):
            raise DataError(
                f"{row.where}: {named} has {key!r}, which training would ignore; take it out"
            )
    role = value[role_key]
    if not isinstance(role, str) or role not in roles:
        near = did_you_mean(role, roles) if isinstance(role, str) else ""
        raise DataError(
            f"{row.where}: {named} has the unknown role {role!r}; expected one of "
            f"{', '.join(roles)}.{near}"
        )
    content = text_in(row, value[content_key], f"{content_key!r} of {named}")
    return {"role": roles[role], "content": content}


def conversation(row: RawRow, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a conversation that can be trained on.

    Raises:
        DataError: nobody answers, one speaks twice in a row, or a system message comes late.
    """
    roles = [message["role"] for message in messages]
    for number, (before, role) in enumerate(pairwise(roles), start=2):
        if role == before:
            raise DataError(
                f"{row.where}: messages {number - 1} and {number} are both of {role!r}; join them "
                "into one"
            )
        if role == "system":
            raise DataError(
                f"{row.where}: message {number} is of 'system', which may only be first"
            )
    if "assistant" not in roles:
        raise DataError(
            f"{row.where}: no message is of 'assistant', so that there is nothing to train on"
        )
    return {"messages": messages}


SHAPES: dict[str, tuple[Kind, Shape]] = {
    "text": ("text", text_row),
    "prompt_completion": ("prompt_completion", prompt_completion_row),
    "messages": ("messages", messages_row),
    "alpaca": ("prompt_completion", alpaca_row),
    "sharegpt": ("messages", sharegpt_row),
}
"""What a row of each format becomes, and how."""
