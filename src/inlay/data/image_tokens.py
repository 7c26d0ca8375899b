"""Conversations with images as tokens: which of them the assistant says, and where images stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inlay.data.picture import Picture
from inlay.data.rows import Rows
from inlay.data.summary import Piece, pieces
from inlay.data.tokens import Encoded, common_prefix
from inlay.errors import DataError, InlayError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

    from inlay.data.image_reader import ImageReader

TEXT_INPUTS = ("input_ids", "attention_mask")
"""What every text has, with images and without."""


def conversations(
    sides: Sequence[Rows], reader: ImageReader, max_length: int
) -> list[list[Encoded]]:
    """Return conversations as tokens, uncut; the rows of several sides show the same images.

    These are opened and prepared once.
    """
    found: list[list[Encoded]] = []
    for index in range(len(sides[0])):
        pictures = tuple(sides[0].rows[index]["images"])
        images = reader.opened(pictures)
        with reader.remembering():
            found.append([conversation(rows, index, pictures, images, reader) for rows in sides])
        check_images_kept(sides[0], index, found[-1][0], reader, max_length)
    return [[row[number] for row in found] for number in range(len(sides))]


def conversation(
    rows: Rows,
    index: int,
    pictures: tuple[Picture, ...],
    images: Sequence[Image],
    reader: ImageReader,
) -> Encoded:
    """Return one conversation as tokens, trained where the assistant speaks."""
    from jinja2 import TemplateError

    messages = rows.rows[index]["messages"]
    try:
        text = reader.written(messages)
        found = reader.inputs(text, images)
        ids = found["input_ids"][0].tolist()
        trained = answers(messages, text, ids, partial_tokens(reader, messages, images))
    except InlayError:
        raise
    except TemplateError as error:
        raise DataError(
            f"{rows.where(index)}: the model's chat template refuses the messages: {error}"
        ) from error
    except (ValueError, TypeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{rows.where(index)}: the model's processor refuses the row: {reason}"
        ) from error
    return Encoded(
        ids,
        trained,
        len(ids),
        text=text,
        pictures=pictures,
        kinds=kinds_in(found),
        image_tokens=frozenset(reader.image_tokens),
    )


PartialTokens = Callable[[int, bool], tuple[str, list[int]]]
"""(messages, whether the assistant is about to speak) -> their text and tokens."""


def partial_tokens(
    reader: ImageReader, messages: Sequence[Mapping[str, Any]], images: Sequence[Image]
) -> PartialTokens:
    """Return what gives the text and tokens of a conversation's first messages."""

    def found(upto: int, generate: bool) -> tuple[str, list[int]]:
        text = reader.written(messages[:upto], generate=generate)
        text = text if generate else text.rstrip()
        inputs = reader.inputs(text, images[: places_in(messages[:upto])])
        return text, inputs["input_ids"][0].tolist()

    return found


def places_in(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of images in messages."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def answers(
    messages: Sequence[Mapping[str, Any]], text: str, ids: list[int], part: PartialTokens
) -> list[bool]:
    """Return which tokens the assistant says: those each of its messages adds."""
    trained = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, before_ids = part(number, True)
        after, after_ids = part(number + 1, False)
        if not (text.startswith(after) and after.startswith(before)):
            raise ModelError(
                "the model's chat template writes a turn otherwise once more turns follow, so that "
                "what the assistant says cannot be told; give another template"
            )
        start, end = common_prefix(before_ids, ids), common_prefix(after_ids, ids)
        trained[start:end] = [True] * (end - start)
    return trained


def check_images_kept(
    rows: Rows, index: int, row: Encoded, reader: ImageReader, max_length: int
) -> None:
    """Raise when a row's images are not all among its first `max_length` tokens."""
    if not row.pictures:
        return
    stands_for = reader.image_tokens
    end = max((i + 1 for i, token in enumerate(row.input_ids) if token in stands_for), default=0)
    if not end:
        raise ModelError(
            "the model's chat template writes nothing for an image; give one that does"
        )
    if end > max_length:
        raise DataError(
            f"{rows.where(index)}: the row's images end at token {end}, and max_length "
            f"{max_length} would cut through them; raise max_length, or lower max_pixels"
        )


def kinds_in(found: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return a text's inputs that have one value for each token, other than its ids."""
    shape = found["input_ids"].shape
    held = {n: value for n, value in found.items() if n not in TEXT_INPUTS and value.shape == shape}
    return {name: value[0].tolist() for name, value in held.items()}


def question(reader: ImageReader, prompt: str, pictures: Sequence[Picture]) -> Encoded:
    """Return images and a user's words about them, up to where the assistant answers."""
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": prompt}]
    text = reader.written([{"role": "user", "content": content}], generate=True)
    found = reader.inputs(text, reader.opened(pictures))
    ids = found["input_ids"][0].tolist()
    return Encoded(
        ids,
        [False] * len(ids),
        len(ids),
        text=text,
        pictures=tuple(pictures),
        kinds=kinds_in(found),
    )


def joined_pieces(row: Encoded, reader: ImageReader) -> list[Piece]:
    """Return a row's text token by token, its images' tokens as one with their count."""
    stands_for = reader.image_tokens
    ids: list[int] = []
    trained: list[bool] = []
    counts: list[int] = []
    for token, trains in zip(row.input_ids, row.trained, strict=True):
        if token in stands_for and ids and ids[-1] == token:
            counts[-1] += 1
            continue
        ids.append(token)
        trained.append(trains)
        if token in stands_for:
            counts.append(1)
    images = {str(reader.tokenizer.decode([token])) for token in stands_for}
    left = iter(counts)
    found: list[Piece] = []
    for piece in pieces(replace(row, input_ids=ids, trained=trained), reader.tokenizer):
        count = next(left, 1) if piece.text in images else 1
        found.append(replace(piece, text=f"{piece.text} x {count} ") if count > 1 else piece)
    return found
