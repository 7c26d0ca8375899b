"""Conversations with images as tokens, and as the tensors a model sees images by.

Only tokens are kept of a row; its images are decoded and prepared again whenever it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.data.labelled import Labelled, labelled
from inlay.data.picture import Picture
from inlay.data.preference import SIDES, Pair, paired, side_of
from inlay.data.processor import ImageReader, Pictured, kinds_in
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
    "bytes_of",
    "encode_image_labelled",
    "encode_image_pairs",
    "encode_images",
    "kinds_beside",
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
    (whole,) = encoded([rows], reader, max_length)
    check_trained(whole, rows, max_length)
    return ended([cut_to(row, max_length) for row in whole], reader)


def encode_image_pairs(rows: Rows, reader: ImageReader, max_length: int) -> list[Pair]:
    """Return preferences about images as tokens; the errors are those of both kinds of rows."""
    sides = encoded([side_of(rows, side) for side in SIDES], reader, max_length)
    return paired(rows, [ended(side, reader) for side in sides], max_length)


def encode_image_labelled(rows: Rows, reader: ImageReader, max_length: int) -> list[Labelled]:
    """Return labelled answers about images as tokens; the errors are those of both kinds."""
    (whole,) = encoded([side_of(rows, "completion")], reader, max_length)
    return labelled(rows, ended(whole, reader), max_length)


def ended(rows: Sequence[Pictured], reader: ImageReader) -> list[Pictured]:
    """Return rows that know whether their last trained token is one at which generation stops."""
    stops = stop_tokens(reader.tokenizer)
    return [replace(row, ends=last_trained(row, reader.tokenizer) in stops) for row in rows]


def encoded(
    sides: Sequence[Rows], reader: ImageReader, max_length: int
) -> tuple[list[Pictured], ...]:
    """Return conversations as tokens, uncut; the rows of several sides show the same images.

    These are opened and prepared once.
    """
    found: list[list[Pictured]] = []
    for index in range(len(sides[0])):
        pictures = tuple(sides[0].rows[index]["images"])
        images = reader.opened(pictures)
        with reader.remembering():
            found.append([conversation(rows, index, pictures, images, reader) for rows in sides])
        check_images_kept(sides[0], index, found[-1][0], reader, max_length)
    return tuple([row[number] for row in found] for number in range(len(sides)))


def conversation(
    rows: Rows,
    index: int,
    pictures: tuple[Picture, ...],
    images: Sequence[Image],
    reader: ImageReader,
) -> Pictured:
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
    return Pictured(
        ids,
        trained,
        len(ids),
        text=text,
        pictures=pictures,
        kinds=kinds_in(found),
        stands_for=frozenset(reader.image_tokens),
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
    found = reader.inputs(text, reader.opened(pictures))
    ids = found["input_ids"][0].tolist()
    return Pictured(
        ids,
        [False] * len(ids),
        len(ids),
        text=text,
        pictures=tuple(pictures),
        kinds=kinds_in(found),
    )


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


def kinds_beside(
    rows: Sequence[Pictured],
    width: int,
    *,
    kept: Sequence[int] | None = None,
    left: bool = False,
) -> dict[str, Tensor]:
    """Return what is read of each token beside its number, for rows under one another.

    Args:
        rows: the rows.
        width: the batch's tokens a row; shorter ones are padded with zeros.
        kept: how many tokens of each row are used; all that it has if not given.
        left: whether rows end, rather than begin, together.
    """
    counts = [len(row.input_ids) for row in rows] if kept is None else kept
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in rows for name in row.kinds):
        batch[name] = torch.zeros(len(rows), width, dtype=torch.long)
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if name in row.kinds:
                part = slice(width - count, width) if left else slice(0, count)
                batch[name][number, part] = torch.tensor(row.kinds[name][:count])
    return batch


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors one after another, smaller ones filled with zeros as processors do."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    filled: list[Tensor] = []
    for part in parts:
        whole = part.new_zeros(part.shape[0], *largest)
        whole[tuple(slice(0, size) for size in part.shape)] = part
        filled.append(whole)
    return torch.cat(filled)


class ImageInputs:
    """Gives what a model needs of rows beside their tokens: pixels, grids, kinds of tokens.

    What was prepared for images is kept while there is room for it, once for all rows of the same
    ones; else it is made again.
    """

    def __init__(
        self, reader: ImageReader, dtype: torch.dtype = torch.float32, room: int = ROOM
    ) -> None:
        self.reader, self.dtype, self.room = reader, dtype, room
        self.kept: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def __call__(
        self,
        rows: Sequence[Pictured],
        *,
        width: int,
        kept: Sequence[int] | None = None,
        left: bool = False,
    ) -> dict[str, Tensor]:
        """Return the inputs of a batch; the arguments are those of `kinds_beside`."""
        return kinds_beside(rows, width, kept=kept, left=left) | self.images_of(rows)

    def images_of(self, rows: Sequence[Pictured]) -> dict[str, Tensor]:
        """Return the images of rows as one batch: their inputs joined along the first dimension."""
        found = [self.of(row) for row in rows]
        names = dict.fromkeys(name for inputs in found for name in inputs)
        batch = {name: joined([each[name] for each in found if name in each]) for name in names}
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in batch.items()
        }

    def of(self, row: Pictured) -> dict[str, Tensor]:
        """Return the inputs of one row's images."""
        if row.images in self.kept:
            return self.kept[row.images]
        found = self.reader.of(row)
        size = bytes_of(found)
        if size <= self.room:
            self.room -= size
            self.kept[row.images] = found
        return found


def bytes_of(inputs: Mapping[str, Tensor]) -> int:
    """Return the bytes of a row's inputs."""
    return sum(value.nbytes for value in inputs.values())
