"""Rows with images: found, checked and brought to conversations; an image is decoded when used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inlay.data.fields import EmptyFieldError, is_missing
from inlay.data.image_columns import (
    COLUMNS,
    hold_images,
    is_image_part,
    parts_in,
    talks,
    words_about_images,
)
from inlay.data.picture import Picture, picture_at
from inlay.data.raw import RawRow
from inlay.data.rows import Format, Kind, Rows, Shape, group_of, normalise, shape_of, shaped
from inlay.errors import DataError

MARK = "\ufffc"
"""Stands in a text for an image, while the text is checked."""
PLACEHOLDER = "<image>"
"""What a text may say where an image of the row goes."""
PART_KEYS = ("image", "url", "path", "base64", "image_url")
"""The keys under which a part of a message may hold its image."""
Held = tuple[Any, str]
"""What a row says of an image, and where: `'image'`, `'images' 2`, `the image in message 1`."""


def normalise_shown(raw: Sequence[RawRow], *, allow_urls: bool = False, **columns: Any) -> Rows:
    """Return rows with or without images, as the first of them has some or not.

    Args:
        raw: the rows as read; at least one.
        allow_urls: fetch images named by an http(s) address.
        columns: the further arguments of `normalise`.
    """
    if hold_images(raw[0], **columns):
        return normalise_images(raw, allow_urls=allow_urls, **columns)
    return replace(normalise(raw, **columns), notes=words_about_images(raw, columns))


def normalise_images(
    raw: Sequence[RawRow],
    *,
    prompt: str | None = None,
    completion: str | None = None,
    text: str | None = None,
    format: Format = "auto",
    group: str | None = None,
    skip_empty: bool = False,
    allow_urls: bool = False,
) -> Rows:
    """Return rows as conversations of `{"type": "image" | "text"}` parts, with their images.

    A prompt and its completion become a user's and an assistant's message. Images stand where
    the text says `<image>` or a message has an image part, else before the first user's words.
    Unless a group says otherwise, rows of the same images stay on one side of a split.

    Args:
        raw: the rows as read; at least one.
        prompt: as in `normalise`, and so are completion, text, format, group and skip_empty.
        allow_urls: fetch images named by an http(s) address.
    """
    if text is not None:
        raise DataError(
            "'text' trains on a whole column and has no place for images; name prompt and "
            "completion, or write messages"
        )
    first, _ = without_images(raw[0])
    kind, shape = shape_of(first, prompt, completion, None, format)
    if kind == "text":
        raise DataError(
            f"{raw[0].where}: a row with images needs a prompt and a completion, or messages; it "
            "has 'text'"
        )

    def conversation(row: RawRow, found: dict[str, Any], pictures: list[Picture]) -> dict[str, Any]:
        return with_images(row, messages_of(found), pictures)

    groups: Groups = same_images if group is None else lambda row, _: group_of(row, group)
    placing = Placing(shape, conversation, allow_urls)
    return pictured(raw, "images", placing, groups, skip_empty)


Groups = Callable[[RawRow, dict[str, Any]], str]
Place = Callable[[RawRow, dict[str, Any], list[Picture]], dict[str, Any]]
"""(the row as read, in its shape without images, its images) -> the row with them."""


@dataclass(frozen=True)
class Placing:
    """Brings a row to its shape without images, and puts them in place."""

    shape: Shape
    place: Place
    allow_urls: bool

    def __call__(self, row: RawRow) -> dict[str, Any]:
        plain, held = without_images(row)
        found = self.shape(plain)
        pictures = [picture_from(row, value, name, self.allow_urls) for value, name in held]
        return self.place(row, found, pictures)


def pictured(
    raw: Sequence[RawRow], kind: Kind, placing: Placing, groups: Groups, skip_empty: bool
) -> Rows:
    """Return rows of one kind with their images, whose content counts in the hash."""
    if find_spec("PIL") is None:
        raise DataError(
            "the rows have images, which Pillow reads, and it is not installed; run pip install "
            "'inlay[vision]'"
        )
    found = shaped(raw, kind, placing, groups, skip_empty)
    return replace(found, sha256=content_hash(found), pictured=True)


def same_images(row: RawRow, found: dict[str, Any]) -> str:
    """Return the key that rows of the same images share; a row without images has its own."""
    pictures: list[Picture] = found["images"]
    return " ".join(sorted({p.sha256 for p in pictures})) or f"{row.where}"


def content_hash(rows: Rows) -> str:
    """Return the SHA-256 of the rows with their images' content, wherever it lies."""
    found = hashlib.sha256(rows.sha256.encode())
    for row in rows.rows:
        for picture in row["images"]:
            found.update(picture.sha256.encode())
    return found.hexdigest()


# A row without its images, and again with them


def without_images(row: RawRow) -> tuple[RawRow, list[Held]]:
    """Return a row with marks in its texts where images go, and what it says of these, in order."""
    values = {name: value for name, value in row.values.items() if name not in COLUMNS}
    written: dict[str, list[Held]] = {}
    for name in talks(values):
        written[name] = []
        turns = enumerate(values[name], start=1)
        values[name] = [marked_turn(row, turn, number, written[name]) for number, turn in turns]
    inline, held = written_once(row, written), column_images(row)
    if inline and held:
        raise DataError(
            f"{row.where}: images stand both in the messages and in the column {held[0][1]}; "
            "write them in one place"
        )
    plain = replace(row, values={key: marked(value) for key, value in values.items()})
    return plain, held or inline


def written_once(row: RawRow, written: Mapping[str, list[Held]]) -> list[Held]:
    """Return the images in a row's messages; two answers to one prompt show them twice."""
    chosen, rejected = (written.get(name, []) for name in ("chosen", "rejected"))
    if [value for value, _ in chosen] != [value for value, _ in rejected]:
        raise DataError(
            f"{row.where}: 'chosen' and 'rejected' show different images; both must answer to the "
            "same ones"
        )
    return [held for name, each in written.items() if name != "rejected" for held in each]


def column_images(row: RawRow) -> list[Held]:
    """Return the images in a row's column, with the column's name; an empty list means none."""
    held = {name: row.values[name] for name in COLUMNS if name in row.values}
    given = {name: value for name, value in held.items() if not is_missing(value)}
    if len(given) > 1:
        raise DataError(f"{row.where}: 'image' and 'images' are both given; keep one of them")
    for name, value in (given or held).items():
        many = list(value) if isinstance(value, list | tuple) else [value]
        return [(each, f"{name!r}" + f" {n}" * (len(many) > 1)) for n, each in enumerate(many, 1)]
    return []


def marked(value: Any) -> Any:
    """Return a text, or a conversation, with a mark for every `<image>` in it."""
    if isinstance(value, str):
        return value.replace(PLACEHOLDER, MARK)
    if isinstance(value, list):
        return [marked(item) for item in value]
    if isinstance(value, Mapping):
        return {key: marked(item) for key, item in value.items()}
    return value


def marked_turn(row: RawRow, turn: Any, number: int, inline: list[Held]) -> Any:
    """Return a message whose parts are joined to one text; its images are added to `inline`."""
    if not parts_in(turn):
        return turn
    texts: list[str] = []
    for part in turn["content"]:
        if not isinstance(part, Mapping) or not (is_image_part(part) or "text" in part):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(
                f"{row.where}: message {number} has a part of type {kind!r}; expected 'text' or "
                "'image'"
            )
        if not is_image_part(part):
            texts.append(str(part["text"] or ""))
            continue
        texts.append(MARK)
        value = next((part[key] for key in PART_KEYS if not is_missing(part.get(key))), None)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        elif part.get("base64") is value and isinstance(value, str):
            value = {"bytes": value}
        if value is not None:
            inline.append((value, f"the image in message {number}"))
    return {**turn, "content": "".join(texts)}


def messages_of(shaped_row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row as messages; a prompt is a user's, without the space its completion took."""
    if "messages" in shaped_row:
        return list(shaped_row["messages"])
    return [
        {"role": "user", "content": shaped_row["prompt"]},
        {"role": "assistant", "content": shaped_row["completion"].removeprefix(" ")},
    ]


def with_images(
    row: RawRow, messages: list[dict[str, str]], pictures: list[Picture]
) -> dict[str, Any]:
    """Return a conversation of parts, with its images and its last answer."""
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{row.where}: the last message must be of 'assistant', to be trained on")
    places = [(number, m["role"]) for number, m in enumerate(messages, start=1) if has_place(m)]
    for number, role in places:
        if role != "user":
            raise DataError(
                f"{row.where}: message {number} of {role!r} has an image; images may stand in "
                "messages of 'user' alone"
            )
    count = sum(message["content"].count(MARK) for message in messages)
    if count and count != len(pictures):
        raise DataError(
            f"{row.where}: the text has {count} places for images ({PLACEHOLDER}), and the row "
            f"has {len(pictures)} images; as many are needed"
        )
    if not count and pictures:
        messages = before_first_words(messages, MARK * len(pictures))
    return {
        "messages": [{"role": m["role"], "content": parts_of(m["content"])} for m in messages],
        "images": pictures,
        "completion": messages[-1]["content"],
    }


def before_first_words(messages: list[dict[str, str]], marks: str) -> list[dict[str, str]]:
    first = next(n for n, message in enumerate(messages) if message["role"] == "user")
    asked = {**messages[first], "content": marks + messages[first]["content"]}
    return [*messages[:first], asked, *messages[first + 1 :]]


def has_place(message: Mapping[str, str]) -> bool:
    return MARK in message["content"]


def parts_of(content: str) -> list[dict[str, str]]:
    """Return a text with marks as parts, as chat templates take them."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(MARK)):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def picture_from(row: RawRow, value: Any, name: str, allow_urls: bool) -> Picture:
    """Return an image from a path, an address, bytes, an image column's dict, or PIL's image.

    Paths are relative to the data file.
    """
    where = f"{row.where}: {name}"
    if is_missing(value):
        raise EmptyFieldError(
            f"{where} is empty; name the image, write [] for a row without one, or leave such rows "
            "out with skip_empty"
        )
    return picture_at(value, where, Path(row.source).parent, allow_urls)
