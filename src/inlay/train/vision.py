"""A supervised run on rows with images: what a processor sees, the loop and the measures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.processor import ImageReader, Pictured, image_reader
from inlay.data.rows import Rows
from inlay.data.tokens import summarise
from inlay.data.vision import ImageInputs, encode_images
from inlay.errors import ModelError, UsageError
from inlay.evaluate.images import Seeing
from inlay.evaluate.losses import losses, padded
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.run import compare
from inlay.memory.devices import Device
from inlay.model.shapes import length_multiple
from inlay.train import planning
from inlay.train.arguments import arguments
from inlay.train.collate import IGNORED
from inlay.train.run import Running, Tokens
from inlay.train.supervised import check_ends
from inlay.train.trainer import AdapterTrainer, HeldOut, dataset, labels
from inlay.train.vision_cache import VisionCache, cached_vision

NOT_HERE = {
    "packing": "rows with images are padded, each with its own",
    "cache_trunk": "'cache_vision' keeps what the vision tower gives",
    "eight_bits": "its gate measures the loss of rows without images",
}
"""The keys that rows with images do not know, beside `auto` and off, and why."""
KEPT = "vision.tmp"
"""The file that kept features take if they do not fit in memory."""


class Stages(Running[Pictured]):
    """A run that trains answers about images."""

    images: ImageReader

    def reader(self, folder: Path) -> ImageReader:
        """Return the model's processor, with the run's limit on pixels."""
        check_keys(self.config.model_dump())
        self.images = image_reader(folder, self.config.max_pixels)
        return self.images

    @property
    def targets(self) -> str | list[str] | None:
        """The layers to adapt: the language part's, where the method would take all."""
        chosen = self.config.targets
        if chosen is None and getattr(self.method, "own_targets", None) == "all-linear":
            return "language"
        return chosen

    def encode(self, rows: Rows, tokenizer: Any) -> list[Pictured]:
        """Return rows as tokens; every image is read once."""
        return encode_images(rows, tokenizer, self.config.max_length)

    def check_rows(self, rows: Rows, encoded: list[Pictured]) -> None:
        """Raise when no row trains the end token; tell of rows that were cut or left out."""
        summary = summarise(encoded, rows)
        check_ends(summary, rows, self.config.max_length)
        for lines, what in (
            (summary.truncated, f"cut at max_length {self.config.max_length}"),
            (summary.skipped, "left out: a field is empty"),
            (summary.unended, "without a trained end token"),
        ):
            self.note_lines(lines, what)

    def largest(self, encoded: list[Pictured], device: Device) -> planning.Rows:
        """Raise: a step whose shapes depend on pixels is not followed on fake tensors."""
        del encoded, device
        raise ModelError(planning.NO_IMAGES)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[Pictured],
        record: dict[str, Any],
    ) -> PicturedTrainer:
        """Return the trainer, nothing trained yet; it is here that a tower's output is kept."""
        config, rate = self.config, record["learning_rate"]["value"]
        watched = self.watched()
        self.cache = self.kept_features(model, tokens)
        inputs = self.cache or ImageInputs(self.images, model.dtype)
        args = arguments(
            config.model_copy(update={"packing": False}), model, self.folder.checkpoints, rate
        )
        args.remove_unused_columns = False
        return PicturedTrainer(
            model,
            tokenizer,
            tokens.train,
            args,
            collate=SideBySide(tokens.train, inputs, length_multiple(model)),
            held_out=held_out(model, tokens.validation, inputs, config.batch_size),
            **watched,
        )

    def around(
        self, model: PreTrainedModel, tokens: Tokens[Pictured]
    ) -> AbstractContextManager[None]:
        """Take the steps with the tower's output read, if it is kept."""
        del model, tokens
        return nullcontext() if self.cache is None else self.cache.used()

    def kept_features(self, model: PreTrainedModel, tokens: Tokens[Pictured]) -> VisionCache | None:
        """Return what a frozen tower and projector give for every row, or None to run them.

        Raises:
            UsageError: the run asks for that, and this model cannot have it.
        """
        wanted = self.config.cache_vision
        if not wanted or (wanted == "auto" and not self.rows_come_again(len(tokens.train))):
            return None
        self.stage("running the vision tower once over every row")
        found = cached_vision(
            model,
            self.images,
            [*tokens.train, *tokens.validation],
            self.folder.checkpoints / KEPT,
        )
        if isinstance(found, VisionCache):
            self.note(str(found))
            return found
        if wanted == "auto":
            self.note(f"the vision tower runs in every epoch: {found}")
            return None
        raise UsageError(f"'cache_vision' cannot be used: {found}; leave it at auto")

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[Pictured]
    ) -> ComparisonRecord:
        """Return base against tuned on the test rows."""
        return compare(
            model,
            tokenizer,
            tokens.test_rows,
            tokens.test,
            generate_rows=self.config.generate_rows,
            max_new_tokens=self.config.generate_tokens,
            batch_size=max(self.config.batch_size, 8),
            seeing=Seeing(ImageInputs(self.images, model.dtype)),
        ).to_dict()


class PicturedTrainer(AdapterTrainer):
    """Trains on rows whose images are prepared when a batch needs them."""

    def dataset_of(self, rows: Sequence[Any]) -> Dataset:
        """Return rows as tokens, with their numbers."""
        return dataset(rows).add_column("row", list(range(len(rows))))


@dataclass(frozen=True)
class SideBySide:
    """Pads rows on the right to the longest, each with its images."""

    rows: Sequence[Pictured]
    inputs: ImageInputs
    multiple: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, labels, attention_mask (rows, tokens) and what the model sees."""
        rows = [self.rows[item["row"]] for item in items]
        call = padded(rows, self.multiple).call
        width = call["input_ids"].shape[1]
        wanted = [[*labels(r), *[IGNORED] * (width - len(r.input_ids))] for r in rows]
        return {**call, "labels": torch.tensor(wanted), **self.inputs(rows, width=width)}


def held_out(
    model: PreTrainedModel, rows: list[Pictured], inputs: ImageInputs, batch_size: int
) -> HeldOut | None:
    """Return what measures the mean loss of held-out rows, or None when there are none."""
    if not rows:
        return None

    def measure() -> dict[str, float]:
        found = losses(model, rows, max(batch_size, 8), join=Seeing(inputs).join)
        return {"loss": sum(row.nll for row in found) / sum(row.tokens for row in found)}

    return measure


def check_keys(config: dict[str, Any]) -> None:
    """Raise for a key that rows with images do not know."""
    for key, reason in NOT_HERE.items():
        if config[key] not in (False, "auto"):
            raise UsageError(f"{key!r} does not apply to rows with images ({reason}); take it out")
