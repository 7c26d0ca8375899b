"""The images of a run's rows as its model sees them; what a frozen tower gives may be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from inlay.data.image_inputs import ROOM, ImageInputs, bytes_of
from inlay.data.image_reader import ImageReader
from inlay.data.tokens import Encoded
from inlay.errors import UsageError
from inlay.evaluate.images import Seeing
from inlay.methods.catalog import build_method
from inlay.run.config import RunConfig
from inlay.train.features.vision import VisionCache, cached_vision

Config = TypeVar("Config", bound=RunConfig)
NOT_HERE = {
    "packing": "rows with images are padded, each with its own",
    "cache_trunk": "'cache_vision' keeps what the vision tower gives",
    "eight_bits": "its gate measures the loss of rows without images",
}
"""The keys that rows with images do not know, beside `auto` and off, and why."""
KEPT = "vision.tmp"
"""The file that kept features take if they do not fit in memory."""


class RowImages:
    """What gives a model the images of rows: the processor, or the features that are kept."""

    def __init__(self, reader: ImageReader, dtype: torch.dtype) -> None:
        self.reader = reader
        self.inputs = ImageInputs(reader, dtype)
        self.cache: VisionCache | None = None

    @property
    def seeing(self) -> Seeing:
        return Seeing(self.inputs)

    def prepare_again(self, model: PreTrainedModel) -> None:
        """Prepare images from their pixels again, with no features kept."""
        self.cache, self.inputs = None, ImageInputs(self.reader, model.dtype)

    def keep(
        self,
        model: PreTrainedModel,
        rows: Sequence[Encoded],
        folder: Path,
        required: bool,
        note: Callable[[str], None],
    ) -> None:
        """Run a frozen tower and projector once over every row's images, and keep the result."""
        found = cached_vision(model, self.reader, rows, folder / KEPT)
        if isinstance(found, VisionCache):
            note(str(found))
            self.cache = self.inputs = found
        elif required:
            raise UsageError(f"'cache_vision' cannot be used: {found}; leave it at auto")
        else:
            note(f"the vision tower runs in every epoch: {found}")

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext() if self.cache is None else self.cache.reading()

    def used(self) -> AbstractContextManager[None]:
        """Let the model read the kept features inside the block, and delete them after it."""
        return nullcontext() if self.cache is None else self.cache.used()

    def kept_bytes(self, batch: Sequence[Encoded], every: Sequence[Encoded]) -> int:
        """Return the bytes of prepared images that are kept, by a batch's bytes per image token."""
        prepared = sum(bytes_of(self.inputs.of(row)) for row in by_images(batch))
        a_token = prepared / max(1, image_tokens(batch))
        return min(ROOM, int(a_token * image_tokens(every)))


def by_images(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return one row for each set of images."""
    return list({row.images: row for row in rows}.values())


def image_tokens(rows: Sequence[Encoded]) -> int:
    """Return how many tokens stand for the different images of rows."""
    return sum(token in row.image_tokens for row in by_images(rows) for token in row.input_ids)


def with_images(config: Config) -> Config:
    """Return a run as rows with images take it.

    They are padded, and a method that would go to all layers goes to the language part's.
    """
    for key, reason in NOT_HERE.items():
        if getattr(config, key) not in (False, "auto"):
            raise UsageError(f"{key!r} does not apply to rows with images ({reason}); take it out")
    method = build_method(config.method, config.hyperparameters)
    all_layers = getattr(method, "own_targets", None) == "all-linear"
    targets = "language" if config.targets is None and all_layers else config.targets
    return config.model_copy(update={"packing": False, "targets": targets})
