"""Conversations with images as tokens, and as the tensors a model sees images by.

Only tokens are kept of a row; its images are decoded and prepared again whenever it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.data.picture import Picture
from inlay.data.processor import ImageReader, Pictured
from inlay.data.rows import Rows
from inlay.data.tokens import (
    Piece,
    check_trained,
    common_prefix,
    cut_to,
    last_trained,
    pieces,
    stop_tokens,
)
from inlay.errors import DataError, InlayError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ROOM",
    "ImageInputs",
    "beside",
    "bytes_of",
    "encode_images",
    "question",
    "shown",
]


# Rows to tokens


ROOM = 256 << 20
"""Bytes of prepared images that are kept in memory at most."""


def encode_images(rows: Rows, reader: ImageReader, max_length: int) -> list[Pictured]:
    """Return conversations as tokens, cut at the end to `max_length`; the assistant's words train.

    Raises:
        DataError: an image cannot be read, a cut would go through a row's images or leave
            nothing to train on, or the chat template refuses a row; names file and line.
        ModelError: the processor has no chat template, or one that leaves images out.
    """
    whole = [encoded(rows, index, reader) for index in range(len(rows))]
    for index, row in enumerate(whole):
        check_images_kept(rows, index, row, reader, max_length)
    check_trained(whole, rows, max_length)
    stops = stop_tokens(reader.tokenizer)
    cut = [cut_to(row, max_length) for row in whole]
    return [replace(row, ends=last_trained(row, reader.tokenizer) in stops) for row in cut]


def encoded(rows: Rows, index: int, reader: ImageReader) -> Pictured:
    """Return one conversation as tokens, trained where the assistant speaks."""
    from jinja2 import TemplateError

    messages, pictures = rows.rows[index]["messages"], tuple(rows.rows[index]["images"])
    images = reader.opened(pictures)
    try:
        with reader.remembering():
            text = reader.written(messages)
            ids = tokens_of(reader, text, images)
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
    return Pictured(ids, trained, len(ids), text=text, pictures=pictures)


def tokens_of(reader: ImageReader, text: str, images: Sequence[Image]) -> list[int]:
    """Return a text's tokens, its images' in their places."""
    return reader.inputs(text, images)["input_ids"][0].tolist()


PartialTokens = Callable[[int, bool], tuple[str, list[int]]]
"""(messages, whether the assistant is about to speak) -> their text and tokens."""


def partial_tokens(
    reader: ImageReader, messages: Sequence[Mapping[str, Any]], images: Sequence[Image]
) -> PartialTokens:
    """Return what gives the text and tokens of a conversation's first messages."""

    def found(upto: int, generate: bool) -> tuple[str, list[int]]:
        text = reader.written(messages[:upto], generate=generate)
        text = text if generate else text.rstrip()
        return text, tokens_of(reader, text, images[: places_in(messages[:upto])])

    return found


def places_in(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return how many images stand in messages."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def answers(
    messages: Sequence[Mapping[str, Any]], text: str, ids: list[int], part: PartialTokens
) -> list[bool]:
    """Return which tokens the assistant says: those each of its messages adds.

    Raises:
        ModelError: the template writes a message otherwise once more follow.
    """
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
    rows: Rows, index: int, row: Pictured, reader: ImageReader, max_length: int
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


def question(reader: ImageReader, prompt: str, pictures: Sequence[Picture]) -> Pictured:
    """Return images and a user's words about them, up to where the assistant answers."""
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": prompt}]
    text = reader.written([{"role": "user", "content": content}], generate=True)
    ids = tokens_of(reader, text, reader.opened(pictures))
    return Pictured(ids, [False] * len(ids), len(ids), text=text, pictures=tuple(pictures))


def shown(row: Pictured, reader: ImageReader) -> list[Piece]:
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


# Rows side by side


def beside(
    found: Sequence[Mapping[str, Tensor]],
    whole: Sequence[int],
    kept: Sequence[int],
    width: int,
    *,
    left: bool = False,
) -> dict[str, Tensor]:
    """Return the inputs of several rows as those of one batch.

    What a row has for each token is cut to the `kept` ones and padded with zeros to `width`, on
    the right or the left; all else is joined along its first dimension, smaller ones filled with
    zeros, as transformers' processors do.

    Args:
        found: what `ImageReader.of` returned for each row.
        whole: how many tokens each row has, uncut.
        kept: how many of them are used.
        width: the batch's tokens a row.
        left: whether rows end, rather than begin, together.
    """
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in found for name in row):
        held = [row.get(name) for row in found]
        given = [value for value in held if value is not None]
        if all(v is None or v.shape == (1, n) for v, n in zip(held, whole, strict=True)):
            batch[name] = given[0].new_zeros(len(found), width)
            for number, (value, count) in enumerate(zip(held, kept, strict=True)):
                if value is not None:
                    part = slice(width - count, width) if left else slice(0, count)
                    batch[name][number, part] = value[0, :count]
        else:
            batch[name] = joined(given)
    return batch


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors one after another, smaller ones filled with zeros."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    filled: list[Tensor] = []
    for part in parts:
        whole = part.new_zeros(part.shape[0], *largest)
        whole[tuple(slice(0, size) for size in part.shape)] = part
        filled.append(whole)
    return torch.cat(filled)


class ImageInputs:
    """Gives what a model needs of rows beside their tokens: pixels, grids, kinds of tokens.

    What was prepared for a row is kept while there is room for it, else it is made again.
    """

    def __init__(
        self, reader: ImageReader, dtype: torch.dtype = torch.float32, room: int = ROOM
    ) -> None:
        self.reader, self.dtype, self.room = reader, dtype, room
        self.kept: dict[int, tuple[Pictured, dict[str, Tensor]]] = {}

    def __call__(
        self,
        rows: Sequence[Pictured],
        *,
        width: int,
        kept: Sequence[int] | None = None,
        left: bool = False,
    ) -> dict[str, Tensor]:
        """Return the inputs of a batch; the arguments are those of `beside`."""
        batch = beside(
            [self.of(row) for row in rows],
            [row.length for row in rows],
            [len(row.input_ids) for row in rows] if kept is None else kept,
            width,
            left=left,
        )
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in batch.items()
        }

    def of(self, row: Pictured) -> dict[str, Tensor]:
        """Return the inputs of one row."""
        if id(row) in self.kept:
            return self.kept[id(row)][1]
        found = self.reader.of(row)
        size = bytes_of(found)
        if size <= self.room:
            self.room -= size
            self.kept[id(row)] = (row, found)
        return found


def bytes_of(inputs: Mapping[str, Tensor]) -> int:
    """Return the bytes of a row's inputs."""
    return sum(value.nbytes for value in inputs.values())
