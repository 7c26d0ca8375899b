"""A model's processor: what writes conversations as text, and text with images as tensors."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inlay.data.image_tokens import conversations, joined_pieces
from inlay.data.picture import Picture
from inlay.data.rows import Rows
from inlay.data.summary import Piece
from inlay.data.tokens import Encoded
from inlay.errors import DataError, ModelError
from inlay.model.load.libraries import failures_as_sentences, quiet_transformers
from inlay.model.load.pretrained import read_config
from inlay.model.load.vision import has_processor, read_processor, sees_images

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

LEAST_SIDE = 1


class ImageReader:
    """A model's processor: writes conversations as text, and text with images as tensors."""

    def __init__(self, processor: ProcessorMixin, max_pixels: int | None = None) -> None:
        self.processor: Any = processor
        self.max_pixels = max_pixels

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer

    def whole(self, sides: Sequence[Rows], max_length: int) -> list[list[Encoded]]:
        """Return the conversations of every side as tokens, uncut."""
        return conversations(sides, self, max_length)

    def pieces(self, row: Encoded) -> list[Piece]:
        return joined_pieces(row, self)

    @property
    def image_tokens(self) -> set[int]:
        """The tokens that stand for images."""
        found = {
            getattr(held, name, None)
            for held in (self.processor, self.tokenizer)
            for name in ("image_token_id", "boi_token_id", "eoi_token_id")
        }
        found = {token for token in found if isinstance(token, int)}
        if not found:
            raise ModelError(
                f"{type(self.processor).__name__} does not say which token stands for an image"
            )
        return found

    def written(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = False) -> str:
        """Return a conversation as its chat template writes it."""
        if not self.processor.chat_template:
            raise ModelError(
                "the model's processor has no chat template, which rows with images need; give "
                "the model's folder a chat_template.jinja"
            )
        text: str = self.processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generate
        )
        return text

    def inputs(self, text: str, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return what a model needs of one text with its images, each tensor (1, ...)."""
        begins: Any = self.tokenizer.bos_token
        found = self.processor(
            text=[text],
            images=[list(images)] if images else None,
            return_tensors="pt",
            add_special_tokens=not (begins and text.startswith(begins)),
        )
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def opened(self, pictures: Sequence[Picture]) -> list[Image]:
        """Return the images, each with at most `max_pixels`."""
        return [self.limited(picture.open()) for picture in pictures]

    def limited(self, image: Image) -> Image:
        """Return an image with at most `max_pixels`, its shape kept."""
        width, height = image.size
        if self.max_pixels is None or width * height <= self.max_pixels:
            return image
        scale = math.sqrt(self.max_pixels / (width * height))
        size = (max(int(width * scale), LEAST_SIDE), max(int(height * scale), LEAST_SIDE))
        from PIL.Image import Resampling

        return image.resize(size, Resampling.LANCZOS)

    def of(self, row: Encoded) -> dict[str, Tensor]:
        """Return what a model needs of one row's images: pixels, grids, sizes."""
        if not row.pictures:
            return {}
        found = self.inputs(row.text, self.opened(row.pictures))
        return {n: value for n, value in found.items() if value.shape != found["input_ids"].shape}

    @contextmanager
    def remembering(self) -> Generator[None]:
        """Prepare images of one row once, however often its text is written inside the block."""
        before = self.processor.image_processor
        self.processor.image_processor = Remembering(before)
        try:
            yield
        finally:
            self.processor.image_processor = before


class Remembering:
    """An image processor that prepares the same images once."""

    def __init__(self, inner: Any) -> None:
        self.__dict__["inner"], self.__dict__["last"] = inner, ((), None)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        key = (identities(images), repr(args), repr(sorted(kwargs.items(), key=str)))
        if self.last[0] != key:
            self.__dict__["last"] = (key, self.inner(images, *args, **kwargs))
        made = self.last[1]
        return type(made)(dict(made)) if hasattr(made, "items") else made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def identities(images: Any) -> Any:
    if isinstance(images, list | tuple):
        return tuple(identities(image) for image in images)
    return id(images)


def image_reader(folder: Path, max_pixels: int | None) -> ImageReader:
    """Return the processor of a model that sees images."""
    config = read_config(folder, trust_remote_code=False)
    if not sees_images(config):
        raise DataError(
            f"the rows have images, and {folder.name} ({config.model_type}) is a model that sees "
            "none; take another model, or the images' column out of the data"
        )
    if not has_processor(folder):
        raise ModelError(
            f"{folder} says nowhere how images are prepared: it has no preprocessor_config.json; "
            "save the model's processor there with its save_pretrained"
        )
    with failures_as_sentences(folder, "processor"), quiet_transformers():
        return ImageReader(read_processor(folder, config), max_pixels)
