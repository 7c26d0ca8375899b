"""A row's fields: there, text, and not empty; templates filled with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import Formatter
from typing import Any

from inlay.data.raw import RawRow
from inlay.errors import DataError, did_you_mean


class EmptyFieldError(DataError):
    """A row has nothing in a field that it needs; `skip_empty` leaves such rows out."""


def columns(row: RawRow) -> str:
    return ", ".join(repr(name) for name in row.values) or "(none)"


def is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def present(row: RawRow, name: str) -> Any:
    """Return a column's value."""
    if name not in row.values:
        near = did_you_mean(name, row.values)
        raise DataError(f"{row.where}: no field {name!r}; the row has {columns(row)}.{near}")
    return row.values[name]


def text_in(row: RawRow, value: Any, name: str) -> str:
    """Return a value that must be text with something in it."""
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
    return text_in(row, present(row, name), repr(name))


def filled(row: RawRow, spec: str, first: RawRow) -> str:
    """Return the column of that name, or the template of that text with its columns filled in."""
    if spec in first.values or "{" not in spec:
        return text_field(row, spec)
    parts = template_parts(spec)
    if all(name is None for _, name in parts):
        raise DataError(
            f"the template {spec!r} has no column in it, so that every row would say the same; "
            "write columns in single braces, such as {findings}"
        )
    return "".join(
        literal + ("" if name is None else text_field(row, name)) for literal, name in parts
    )


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Return a template as pairs of literal text and the column that follows it."""
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


def number_field(row: RawRow, name: str) -> float:
    """Return a finite number."""
    value = present(row, name)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise EmptyFieldError(
            f"{row.where}: {name!r} is empty; fill it in, or leave such rows out with skip_empty"
        )
    number = as_number(value)
    if number is None:
        raise DataError(f"{row.where}: {name!r} is {value!r}; kind: regression needs a number")
    if not math.isfinite(number):
        raise DataError(f"{row.where}: {name!r} is {number}; expected a finite number")
    return number


def as_number(value: Any) -> float | None:
    """Return a number, also one that a table holds as text; None if the value is not a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def there(raw: Sequence[RawRow], column: str | None) -> str | None:
    """Return the column's name if rows have it, else None."""
    return column if column in raw[0].values else None
