"""Whether a row's columns or messages hold images, or words that are named as images are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from inlay.data.fields import is_missing, template_parts
from inlay.data.picture import WEB
from inlay.data.raw import RawRow
from inlay.errors import DataError

COLUMNS = ("image", "images")
TALKS = ("messages", "prompt", "chosen", "rejected", "completion")
"""The fields that may hold messages, whose parts may be images."""
LONGEST_NAME = 255
"""Characters of a path at most."""
SHOWN = 40
"""Characters of a column's words that are told at most."""


def hold_images(row: RawRow, **columns: Any) -> bool:
    """Return whether a row has an image's column, or messages with an image among their parts.

    A column's words are an image where they are a file's, an address, end as image files do, or
    are one word, which is taken for a path unless a key of the run reads the column.

    Args:
        row: the row as read.
        columns: the arguments of `normalise` that name columns.
    """
    if any(is_an_image(row, name, columns) for name in COLUMNS if name in row.values):
        return True
    parts = (
        part for name in talks(row.values) for turn in row.values[name] for part in parts_in(turn)
    )
    return any(isinstance(part, Mapping) and is_image_part(part) for part in parts)


def talks(values: Mapping[str, Any]) -> list[str]:
    """Return the fields of a row that hold messages."""
    return [name for name in TALKS if isinstance(values.get(name), list)]


def is_an_image(row: RawRow, name: str, columns: Mapping[str, Any]) -> bool:
    """Return whether a column holds an image rather than text about one."""
    value, folder = row.values[name], Path(row.source).parent
    named = name in columns_read(columns)
    if isinstance(value, list):
        return not value or any(names_an_image(each, folder, named) for each in value)
    return names_an_image(value, folder, named)


def names_an_image(value: Any, folder: Path, words: bool) -> bool:
    """Return whether a value is an image; one word is, unless it may stand for itself."""
    if not isinstance(value, str):
        return True
    kind, _ = guess_type(value)
    return (
        value.startswith("data:")
        or value.lower().startswith(WEB)
        or (kind or "").startswith("image/")
        or is_there(folder / value)
        or (not words and is_one_word(value))
    )


def is_one_word(value: str) -> bool:
    return value.split() == [value] and value.isprintable() and len(value) <= LONGEST_NAME


def columns_read(columns: Mapping[str, Any]) -> set[str]:
    words = [each for key, each in columns.items() if isinstance(each, str) and key != "format"]
    return {*words, *(name for each in words for _, name in template_parts(each) if name)}


def is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parts_in(turn: Any) -> list[Any]:
    """Return the parts of a message; none if its content is text."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    return content if isinstance(content, list) else []


def is_image_part(part: Mapping[str, Any]) -> bool:
    """Return whether a part of a message is an image, in transformers' or OpenAI's form."""
    return part.get("type") in ("image", "image_url")


def words_about_images(raw: Sequence[RawRow], columns: Mapping[str, Any]) -> list[str]:
    """Return what to tell of a column that is named as images are, holds words and is not read."""
    notes: list[str] = []
    read = columns_read(columns)
    for name in (each for each in COLUMNS if each not in read):
        held = [row for row in raw if has_something(row.values.get(name))]
        for row in held:
            if is_an_image(row, name, columns):
                raise DataError(
                    f"{row.where}: {name!r} is an image, and the first row, {raw[0].where}, has "
                    "none; name the image of every row, and write [] for a row without one"
                )
        if held:
            notes.append(
                f"the column {name!r} holds words and no images, and is not read: "
                f"{shortened(held[0].values[name])} in {held[0].where}"
            )
    return notes


def has_something(value: Any) -> bool:
    return not is_missing(value) and value != []


def shortened(words: Any) -> str:
    text = str(words)
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")
