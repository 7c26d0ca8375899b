"""Rows with images: found, checked and brought to conversations; an image is decoded when used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from inlay.data.fields import EmptyFieldError, is_missing, template_parts
from inlay.data.picture import WEB, Picture, picture_at
from inlay.data.read import RawRow
from inlay.data.rows import Format, Rows, group_of, normalise, shape_of, shaped
from inlay.errors import DataError

__all__ = ["hold_images", "normalise_images", "normalise_shown"]

MARK = "\ufffc"
"""Stands in a text for an image, while the text is checked."""
PLACEHOLDER = "<image>"
"""What a text may say where an image of the row goes."""
COLUMNS = ("image", "images")
PART_KEYS = ("image", "url", "path", "base64", "image_url")
"""The keys under which a part of a message may hold its image."""
LONGEST_NAME = 255
"""Characters of a path at most."""
SHOWN = 40
"""Characters of a column's words that are told at most."""
Held = tuple[Any, str]
"""What a row says of an image, and where: `'image'`, `'images' 2`, `the image in message 1`."""


def hold_images(row: RawRow, **columns: Any) -> bool:
    """Say whether a row has an image's column, or messages with an image among their parts.

    A column's words are an image where they are a file's, an address, end as image files do, or
    are one word, which is taken for a path unless a key of the run reads the column.

    Args:
        row: the row as read.
        columns: the arguments of `normalise` that name columns.
    """
    if any(is_an_image(row, name, columns) for name in COLUMNS if name in row.values):
        return True
    turns = row.values.get("messages")
    parts = (
        part for turn in (turns if isinstance(turns, list) else ()) for part in content_parts(turn)
    )
    return any(isinstance(part, Mapping) and is_image_part(part) for part in parts)


def is_an_image(row: RawRow, name: str, columns: Mapping[str, Any]) -> bool:
    """Say whether a column's value is meant as an image, and not as words about one."""
    value, folder = row.values[name], Path(row.source).parent
    named = name in columns_read(columns)
    if isinstance(value, list):
        return not value or any(names_an_image(each, folder, named) for each in value)
    return names_an_image(value, folder, named)


def names_an_image(value: Any, folder: Path, words: bool) -> bool:
    """Say whether a value is an image; one word is, unless it may stand for itself."""
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
    """Say whether a text could be a path and nothing else."""
    return value.split() == [value] and value.isprintable() and len(value) <= LONGEST_NAME


def columns_read(columns: Mapping[str, Any]) -> set[str]:
    """Return the columns that the arguments of `normalise` name, alone or in a template."""
    given = [columns.get(key) for key in ("prompt", "completion", "text", "group")]
    words = [each for each in given if each]
    return {*words, *(name for each in words for _, name in template_parts(each) if name)}


def is_there(path: Path) -> bool:
    """Say whether a path, which may be any words, is a file's."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def content_parts(turn: Any) -> list[Any]:
    """Return the parts of a message whose content is a list; none of one that is text."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    return content if isinstance(content, list) else []


def is_image_part(part: Mapping[str, Any]) -> bool:
    """Say whether a part of a message is an image, as transformers and OpenAI write it."""
    return part.get("type") in ("image", "image_url")


def normalise_shown(raw: Sequence[RawRow], *, allow_urls: bool = False, **columns: Any) -> Rows:
    """Return rows with or without images, as the first of them has some or not.

    Args:
        raw: the rows as read; at least one.
        allow_urls: fetch images named by an http(s) address.
        columns: the further arguments of `normalise`.

    Raises:
        DataError: as `normalise` and `normalise_images`, or a later row alone has an image.
    """
    if hold_images(raw[0], **columns):
        return normalise_images(raw, allow_urls=allow_urls, **columns)
    return replace(normalise(raw, **columns), notes=words_about_images(raw, columns))


def words_about_images(raw: Sequence[RawRow], columns: Mapping[str, Any]) -> list[str]:
    """Return what to tell of a column that is named as images are, holds words and is not read.

    Raises:
        DataError: it holds an image in a later row than the first.
    """
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
    """Say whether a column's value is neither empty nor an empty list."""
    return not is_missing(value) and value != []


def shortened(words: Any) -> str:
    """Return the beginning of a text, in quotes."""
    text = str(words)
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


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

    Raises:
        DataError: as `normalise`, or an image that is missing, broken, an address that is not
            allowed, or more or fewer images than the text has places for; names file and line.
    """
    if text is not None:
        raise DataError(
            "'text' trains on a whole column and has no place for images; name prompt and "
            "completion, or write messages"
        )
    if find_spec("PIL") is None:
        raise DataError(
            "the rows have images, which Pillow reads, and it is not installed; run pip install "
            "'inlay[vision]'"
        )
    first, _ = without_images(raw[0])
    kind, shape = shape_of(first, prompt, completion, None, format)
    if kind == "text":
        raise DataError(
            f"{raw[0].where}: a row with images needs a prompt and a completion, or messages; it "
            "has 'text'"
        )

    def conversation(row: RawRow) -> dict[str, Any]:
        plain, held = without_images(row)
        messages = messages_of(shape(plain))
        pictures = [picture_from(row, value, name, allow_urls) for value, name in held]
        return with_images(row, messages, pictures)

    groups: Callable[[RawRow, dict[str, Any]], str] = (
        same_images if group is None else lambda row, _: group_of(row, group)
    )
    found = shaped(raw, "images", conversation, groups, skip_empty)
    return replace(found, sha256=content_hash(found))


def same_images(row: RawRow, found: dict[str, Any]) -> str:
    """Return what rows of the same images have in common; a row without any stands alone."""
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
    """Return a row with marks in its texts where images go, and what it says of these, in order.

    Raises:
        DataError: images stand both in the messages and in a column.
    """
    values = {name: value for name, value in row.values.items() if name not in COLUMNS}
    inline: list[Held] = []
    if isinstance(values.get("messages"), list):
        values["messages"] = [
            marked_turn(row, turn, number, inline)
            for number, turn in enumerate(values["messages"], start=1)
        ]
    held = column_images(row)
    if inline and held:
        raise DataError(
            f"{row.where}: images stand both in the messages and in the column {held[0][1]}; "
            "write them in one place"
        )
    plain = replace(row, values={key: marked(value) for key, value in values.items()})
    return plain, held or inline


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
    """Return a message whose parts are joined to one text; its images are added to `inline`.

    Raises:
        DataError: a part is neither text nor an image.
    """
    if not content_parts(turn):
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
    """Return a conversation of parts, with its images and its last answer.

    Raises:
        DataError: there are more or fewer places than images, an image outside a user's message,
            or the conversation ends in another's message than the assistant's.
    """
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
        asked = next(message for message in messages if message["role"] == "user")
        asked["content"] = MARK * len(pictures) + asked["content"]
    return {
        "messages": [{"role": m["role"], "content": parts_of(m["content"])} for m in messages],
        "images": pictures,
        "completion": messages[-1]["content"],
    }


def has_place(message: Mapping[str, str]) -> bool:
    """Say whether an image goes into a message."""
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

    Raises:
        EmptyFieldError: there is none.
        DataError: it is of another type, is not there, is no image, or its address may not be
            fetched.
    """
    where = f"{row.where}: {name}"
    if is_missing(value):
        raise EmptyFieldError(
            f"{where} is empty; name the image, write [] for a row without one, or leave such rows "
            "out with skip_empty"
        )
    return picture_at(value, where, Path(row.source).parent, allow_urls)
