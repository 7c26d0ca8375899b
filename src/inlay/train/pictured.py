"""What every run on rows with images shares: the processor, and what the model sees."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.processor import ImageReader, Pictured, image_reader
from inlay.data.vision import ImageInputs
from inlay.errors import UsageError
from inlay.evaluate.images import Seeing
from inlay.evaluate.record import ComparisonRecord
from inlay.memory.plan import Plan
from inlay.run.config import RunConfig
from inlay.train.processes.share import Share
from inlay.train.running import Running, Tokens
from inlay.train.trainer import AdapterLoop
from inlay.train.vision_cache import VisionCache, cached_vision
from inlay.train.vision_planning import as_seen

Row = TypeVar("Row")
NOT_HERE = {
    "packing": "rows with images are padded, each with its own",
    "cache_trunk": "'cache_vision' keeps what the vision tower gives",
    "eight_bits": "its gate measures the loss of rows without images",
}
"""The keys that rows with images do not know, beside `auto` and off, and why."""
KEPT = "vision.tmp"
"""The file that kept features take if they do not fit in memory."""


class Pictures(Running[Row]):
    """The part of a run that its rows' images change; it stands before the task's own stages."""

    images: ImageReader
    cache: VisionCache | None = None

    def divide(self, asked: RunConfig, share: Share) -> None:
        """Take this process's part of a run, as rows with images take it."""
        super().divide(asked, share)
        self.config = as_seen(self.config)

    def reader(self, folder: Path) -> ImageReader:
        """Return the model's processor, with the run's limit on pixels."""
        check_keys(self.asked.model_dump())
        self.images = image_reader(folder, self.config.max_pixels)
        return self.images

    def see(
        self, model: PreTrainedModel, train: Sequence[Pictured], held_out: Sequence[Pictured]
    ) -> Seeing:
        """Return what gives the model the images of rows; a frozen tower's output is kept here.

        Raises:
            UsageError: the run asks for that, and this model cannot have it.
        """
        self.cache = self.kept_features(model, train, held_out)
        self.seeing = Seeing(self.cache or ImageInputs(self.images, model.dtype))
        return self.seeing

    def check_model(self, model: PreTrainedModel) -> None:
        """Try nothing on text alone: some models see a prompt with images both ways."""

    def see_afresh(self, model: PreTrainedModel) -> Seeing:
        """Return what gives a model the images of rows of which nothing is kept any more."""
        self.seeing = Seeing(ImageInputs(self.images, model.dtype))
        return self.seeing

    def reading(self) -> AbstractContextManager[None]:
        """Let the model read the tower's output, if it is kept."""
        return nullcontext() if self.cache is None else self.cache.reading()

    def try_largest(self, trainer: AdapterLoop, planned: Plan | None) -> None:
        """Run the largest batch once, as training sees it."""
        with self.reading():
            super().try_largest(trainer, planned)

    def around(self, model: PreTrainedModel, tokens: Tokens[Row]) -> AbstractContextManager[None]:
        """Take the steps with the tower's output read, if it is kept."""
        del model, tokens
        return nullcontext() if self.cache is None else self.cache.used()

    def kept_features(
        self, model: PreTrainedModel, train: Sequence[Pictured], held_out: Sequence[Pictured]
    ) -> VisionCache | None:
        """Return what a frozen tower and projector give for every row, or None to run them."""
        wanted = self.config.cache_vision
        if not wanted or (wanted == "auto" and not self.images_come_again(len(train))):
            return None
        self.stage("running the vision tower once over every row")
        place = self.folder.checkpoints / KEPT
        found = cached_vision(model, self.images, [*train, *held_out], place)
        if isinstance(found, VisionCache):
            self.note(str(found))
            return found
        if wanted == "auto":
            self.note(f"the vision tower runs in every epoch: {found}")
            return None
        raise UsageError(f"'cache_vision' cannot be used: {found}; leave it at auto")

    def images_come_again(self, rows: int) -> bool:
        """Say whether the run sees the images of its rows more than once."""
        return self.rows_come_again(rows)


class Judged(Pictures[Row]):
    """The part of a run on judged answers that their images change."""

    @abstractmethod
    def shown(self, rows: list[Row]) -> list[Pictured]:
        """Return an answer as tokens to the images of each row."""

    def images_come_again(self, rows: int) -> bool:
        """Say so: there are two answers to each, or a reference."""
        del rows
        return True

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[Row],
        record: dict[str, Any],
    ) -> Any:
        """Return the trainer, nothing trained yet; a frozen tower's output is kept first."""
        self.see(model, self.shown(tokens.train), self.shown(tokens.validation))
        stages: Any = super()
        with self.reading():
            return stages.trainer(model, tokenizer, tokens, record)

    def arguments(self, model: PreTrainedModel, learning_rate: float) -> Any:
        """Return TRL's arguments; a batch needs its rows' numbers."""
        stages: Any = super()
        found = stages.arguments(model, learning_rate)
        found.remove_unused_columns = False
        return found

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[Row]
    ) -> ComparisonRecord:
        """Return base against tuned on the test rows."""
        self.see_afresh(model)
        stages: Any = super()
        return stages.measured(model, tokenizer, tokens)


def check_keys(config: Mapping[str, Any]) -> None:
    """Raise for a key that rows with images do not know."""
    for key, reason in NOT_HERE.items():
        if config[key] not in (False, "auto"):
            raise UsageError(f"{key!r} does not apply to rows with images ({reason}); take it out")
