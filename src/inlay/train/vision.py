"""A supervised run on rows with images: what a processor sees, the loop and the measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from inlay.data.vision import ROOM, ImageInputs, bytes_of, encode_images
from inlay.errors import UsageError
from inlay.evaluate.images import Seeing
from inlay.evaluate.losses import losses, padded
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.run import compare
from inlay.memory.devices import Device
from inlay.memory.plan import Plan
from inlay.memory.skeleton import computing_dtype, config_of
from inlay.methods.catalog import build_method
from inlay.model.shapes import length_multiple
from inlay.train import planning
from inlay.train.arguments import arguments
from inlay.train.collate import IGNORED
from inlay.train.config import RunConfig
from inlay.train.run import Running, Tokens
from inlay.train.share import Share
from inlay.train.supervised import check_ends
from inlay.train.trainer import AdapterLoop, AdapterTrainer, HeldOut, dataset, labels
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

    def divide(self, asked: RunConfig, share: Share) -> None:
        """Take this process's part of a run, as rows with images take it."""
        super().divide(asked, share)
        self.config = as_seen(self.config)

    def reader(self, folder: Path) -> ImageReader:
        """Return the model's processor, with the run's limit on pixels."""
        check_keys(self.asked.model_dump())
        self.images = image_reader(folder, self.config.max_pixels)
        return self.images

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
        """Return the largest batch, its images prepared."""
        multiple = planning.padding_multiple(self.config, device)
        return rows_to_plan(self.config, encoded, self.images, multiple)

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
        args = arguments(config, model, self.folder.checkpoints, rate)
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

    def try_largest(self, trainer: AdapterLoop, planned: Plan | None) -> None:
        """Run the largest batch once, as training sees it."""
        with nullcontext() if self.cache is None else self.cache.reading():
            super().try_largest(trainer, planned)

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


# The run as such rows take it, and its largest batch


def as_seen(config: RunConfig) -> RunConfig:
    """Return a run as rows with images take it.

    They are padded, and a method that would go to all layers goes to the language part's.
    """
    method = build_method(config.method, config.hyperparameters)
    all_layers = getattr(method, "own_targets", None) == "all-linear"
    targets = "language" if config.targets is None and all_layers else config.targets
    return config.model_copy(update={"packing": False, "targets": targets})


def rows_to_plan(
    config: RunConfig, rows: Sequence[Pictured], reader: ImageReader, multiple: int
) -> planning.Rows:
    """Return the batch with the most tokens, images' among them, as the model sees it."""
    shape, _ = config_of(config.model, config.revision)
    inputs = ImageInputs(reader, computing_dtype(shape, config.dtype))
    largest = planning.largest_batch(as_seen(config), [len(row.input_ids) for row in rows])
    chosen = [rows[number] for number in largest]
    batch = SideBySide(chosen, inputs, multiple)([{"row": n} for n in range(len(chosen))])
    seen = [sum(token in reader.image_tokens for token in row.input_ids) for row in rows]
    prepared = sum(bytes_of(inputs.of(row)) for row in chosen) / max(
        1, sum(seen[n] for n in largest)
    )
    return planning.Rows(
        batch,
        len(rows),
        sum(len(row.input_ids) for row in rows),
        sum(row.trained_tokens for row in rows),
        beside=min(ROOM, int(prepared * sum(seen))),
        as_run=as_seen,
    )


def row_reader(
    config: RunConfig, rows: Rows, folder: Path, device: Device
) -> Callable[[RunConfig], planning.Rows]:
    """Return what works out a run's largest batch; the rows are encoded once."""
    reader = image_reader(folder, config.max_pixels)
    encoded = encode_images(rows, reader, config.max_length)
    multiple = planning.padding_multiple(config, device)
    return lambda changed: rows_to_plan(changed, encoded, reader, multiple)


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
