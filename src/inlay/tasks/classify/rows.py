"""Rows with labels: a text and its class, its classes or a number; or words and a tag for each."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

from inlay.data.conversations import parsed
from inlay.data.fields import (
    EmptyFieldError,
    as_number,
    columns,
    filled,
    is_missing,
    number_field,
    present,
    text_in,
)
from inlay.data.raw import RawRow
from inlay.data.rows import Kind, Rows, group_of, shaped
from inlay.errors import DataError, did_you_mean

LabelKind = Literal["auto", "single", "multi", "regression", "tokens"]
LABELLED: dict[Kind, Literal["single", "multi", "regression", "tokens"]] = {
    "class": "single",
    "classes": "multi",
    "number": "regression",
    "tags": "tokens",
}
"""What rows with labels are called -> the kind that a run asks for."""
KINDS: dict[str, Kind] = {wanted: kind for kind, wanted in LABELLED.items()}
DEFAULTS = {"tokens": ("tokens", "tags"), "multi": ("text", "labels")}
"""The columns that are read where none is named, if not `text` and `label`."""
OUTSIDE = "O"
"""The tag of a word that is part of nothing."""


def normalise_labels(
    raw: Sequence[RawRow],
    *,
    kind: LabelKind = "auto",
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    group: str | None = None,
    skip_empty: bool = False,
) -> Rows:
    """Return rows of a text (or two) and a label, or of words and tags, every one checked.

    Labels become text: whole numbers and truth values as they are written. Unless a group says
    otherwise, rows of one text stay on one side of a split.

    Args:
        raw: the rows as read; at least one.
        kind: one class a row, several, a number, or a tag for each word; auto: from the data.
        text: a column, or a template with columns in braces; the words' column for `tokens`.
        text_pair: a column or template of a second text; default: `text_pair`, if there is one.
        label: the label's column; default: `label`, `labels` of several, `tags` of words.
        group: a column whose equal values `split` keeps together, such as a patient's id.
        skip_empty: leave out rows with an empty field and list their lines in `skipped`.
    """
    if not raw:
        raise DataError("there are no rows; training needs at least one")
    found = recognised(raw, label) if kind == "auto" else kind
    text_column, label_column = DEFAULTS.get(found, ("text", "label"))
    label = label or default_label(raw[0], label_column)
    text = text or text_column
    if text_pair is None and found != "tokens" and "text_pair" in raw[0].values:
        text_pair = "text_pair"
    if text_pair is not None and found == "tokens":
        raise DataError("rows of words and tags have no second text; take text_pair out")
    read = READERS[found]

    def shape(row: RawRow) -> dict[str, Any]:
        if found == "tokens":
            return tagged(row, text, label)
        values = {"text": filled(row, text, raw[0])}
        if text_pair is not None:
            values["text_pair"] = filled(row, text_pair, raw[0])
        return {**values, "label": read(row, label)}

    groups = same_text if group is None else lambda row, _: group_of(row, group)
    return shaped(raw, KINDS[found], shape, groups, skip_empty)


def default_label(first: RawRow, usual: str) -> str:
    return usual if usual in first.values or "label" not in first.values else "label"


def same_text(row: RawRow, found: dict[str, Any]) -> str:
    del row
    return json.dumps([found.get(name) for name in ("text", "text_pair", "tokens")])


# Which kind


def recognised(raw: Sequence[RawRow], label: str | None) -> LabelKind:
    """Return the kind of label that the rows hold."""
    first = raw[0]
    column = label or next((n for n in ("label", "labels", "tags") if n in first.values), None)
    if column is None:
        near = did_you_mean("label", first.values)
        raise DataError(
            f"{first.where}: no field 'label', 'labels' or 'tags'; the row has {columns(first)}. "
            f"Name the column with label.{near}"
        )
    present(first, column)
    values = [row.values.get(column) for row in raw]
    if any(isinstance(value, list) for value in values):
        return "tokens" if column == "tags" or is_list(first, "tokens") else "multi"
    numbers = [as_number(value) for value in values if not is_missing(value)]
    fractions = (n is not None and math.isfinite(n) and n != int(n) for n in numbers)
    return "regression" if None not in numbers and any(fractions) else "single"


def is_list(row: RawRow, name: str) -> bool:
    return isinstance(row.values.get(name), list)


# One function a kind


def single(row: RawRow, name: str) -> str:
    return class_name(row, present(row, name), repr(name))


def class_name(row: RawRow, value: Any, what: str) -> str:
    """Return the name of a class: text, a whole number or a truth value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        raise DataError(
            f"{row.where}: {what} is {value}, which names no class; give text or a whole number, "
            "or kind: regression to predict the number"
        )
    return text_in(row, value, what).strip()


def multi(row: RawRow, name: str) -> list[str]:
    """Return classes as a list of text, none of them twice; the list may be empty."""
    value = present(row, name)
    value = parsed(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise DataError(
            f"{row.where}: {name!r} must be a list of classes, not {type(value).__name__}; write "
            "[] for none"
        )
    found = [class_name(row, each, f"an entry of {name!r}") for each in value]
    twice = [label for label, count in Counter(found).items() if count > 1]
    if twice:
        raise DataError(f"{row.where}: {name!r} names {twice[0]!r} twice; take one out")
    return found


READERS: dict[str, Callable[[RawRow, str], Any]] = {
    "single": single,
    "multi": multi,
    "regression": number_field,
    "tokens": multi,
}


def tagged(row: RawRow, words: str, tags: str) -> dict[str, Any]:
    """Return words and as many tags."""
    lists = [listed(row, name) for name in (words, tags)]
    if len(lists[0]) != len(lists[1]):
        raise DataError(
            f"{row.where}: {words!r} holds {len(lists[0])} words and {tags!r} {len(lists[1])} "
            "tags; every word needs one tag"
        )
    return {
        "tokens": [text_in(row, w, f"word {n} of {words!r}") for n, w in enumerate(lists[0], 1)],
        "tags": [class_name(row, t, f"tag {n} of {tags!r}") for n, t in enumerate(lists[1], 1)],
    }


def listed(row: RawRow, name: str) -> list[Any]:
    """Return a column that must be a list with something in it; a table may hold it as JSON."""
    value = present(row, name)
    value = parsed(value) if isinstance(value, str) else value
    if is_missing(value) or value == []:
        raise EmptyFieldError(
            f"{row.where}: {name!r} is empty; fill it in, or leave such rows out with skip_empty"
        )
    if not isinstance(value, list):
        raise DataError(f"{row.where}: {name!r} is of type {type(value).__name__}; expected a list")
    return value


# The classes


def labels_of(row: dict[str, Any]) -> list[str]:
    if "tags" in row:
        return row["tags"]
    return row["label"] if isinstance(row["label"], list) else [row["label"]]


def classes_of(rows: Rows) -> tuple[str, ...]:
    """Return the classes of training rows: whole numbers in order, else by name, `O` first."""
    counts = Counter(label for row in rows.rows for label in labels_of(row))
    if len(counts) < (1 if rows.kind == "classes" else 2):
        only = f"only the class {next(iter(counts))!r}" if counts else "no class at all"
        raise DataError(
            f"{rows.source}: the {len(rows)} training rows name {only}, so that there is nothing "
            "to tell apart; give rows of other classes, or another label column"
        )
    if all(label.removeprefix("-").isdecimal() for label in counts):
        return tuple(sorted(counts, key=int))
    return tuple(sorted(counts, key=lambda label: (label != OUTSIDE, label)))


def check_known(rows: Rows, classes: Sequence[str]) -> None:
    """Raise when held-out rows name a class that no training row does."""
    known = set(classes)
    for index, row in enumerate(rows.rows):
        for label in labels_of(row):
            if label not in known:
                raise DataError(
                    f"{rows.where(index)}: the label {label!r} is of no training row, which have "
                    f"{some(classes)}; give training rows of it, another split, or take the row "
                    f"out.{did_you_mean(label, classes)}"
                )


def contradicting(rows: Rows) -> list[int]:
    """Return the lines of the rows whose text stands before them with another label."""
    if rows.kind == "tags":
        return []
    first: dict[str, Any] = {}
    found: list[int] = []
    for row, line in zip(rows.rows, rows.lines, strict=True):
        key = json.dumps([row["text"], row.get("text_pair")])
        if first.setdefault(key, row["label"]) != row["label"]:
            found.append(line)
    return found


def some(classes: Sequence[str], most: int = 8) -> str:
    more = f" and {len(classes) - most} more" if len(classes) > most else ""
    return ", ".join(map(repr, classes[:most])) + more


def loose_tags(rows: Rows) -> list[int]:
    """Return the lines of the rows in which an I- tag follows none of its kind."""
    if rows.kind != "tags":
        return []
    return [
        line
        for row, line in zip(rows.rows, rows.lines, strict=True)
        if any(is_loose(tag, before) for before, tag in pairwise(["", *row["tags"]]))
    ]


def is_loose(tag: str, before: str) -> bool:
    """Return whether a tag continues an entity that the tag before has not begun."""
    return tag.startswith("I-") and before not in (tag, f"B-{tag[2:]}")
