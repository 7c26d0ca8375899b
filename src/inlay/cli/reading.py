"""Rows as tokens for a verb that has a model: with what the model sees, if they have images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.processor import ImageReader, image_reader
from inlay.data.rows import Rows
from inlay.data.tokens import Encoded
from inlay.data.vision import ImageInputs
from inlay.evaluate.images import Seeing
from inlay.model.load.folder import located
from inlay.train.rows import encode_rows


@dataclass(frozen=True)
class Read:
    """Rows as tokens, and what gives their images."""

    encoded: Sequence[Encoded]
    seeing: Seeing | None


def read(
    rows: Rows,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    keys: Mapping[str, Any],
    base: str,
    revision: str | None,
) -> Read:
    """Return supervised rows as tokens, those with images by the base's processor."""
    reader, seeing = reading(rows, model, tokenizer, keys.get("max_pixels"), base, revision)
    return Read(encode_rows(rows, reader, keys["max_length"]), seeing)


def reading(
    rows: Rows,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_pixels: int | None,
    base: str,
    revision: str | None,
) -> tuple[PreTrainedTokenizerBase | ImageReader, Seeing | None]:
    """Return what writes rows as tokens, and what gives a model their images, if they have some."""
    if not rows.pictured:
        return tokenizer, None
    reader = image_reader(located(base, revision), max_pixels)
    return reader, seen_by(model, reader)


def seen_by(model: PreTrainedModel, reader: ImageReader) -> Seeing:
    """Return what gives a model the images of rows."""
    return Seeing(ImageInputs(reader, model.dtype))
