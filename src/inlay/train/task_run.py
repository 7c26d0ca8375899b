"""What one run of a task does: rows to tokens, tokens to batches, loss, trainer, comparison."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.image_reader import ImageReader
from inlay.data.rows import Rows
from inlay.data.tokens import Reader
from inlay.evaluate.comparison import Limits
from inlay.evaluate.record import ComparisonRecord
from inlay.memory.devices import Device
from inlay.memory.skeleton import computing_dtype, config_of
from inlay.model.load.heads import Head
from inlay.run.config import RunConfig
from inlay.train.collate import Collate, items_of
from inlay.train.images import RowImages, with_images
from inlay.train.order import order
from inlay.train.output.events import Event, OnEvent
from inlay.train.overview import Overview
from inlay.train.planning import PlannedRows, largest_batch, padding_multiple
from inlay.train.processes.share import Share
from inlay.train.rows import RunRows, counted, reader_for
from inlay.train.task import Task
from inlay.train.trainer import AdapterLoop

Row = TypeVar("Row")
Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Tokens(Generic[Row]):
    """A run's rows as tokens; the held-out ones cut down to what is measured."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    train_rows: Rows
    validation_rows: Rows
    test_rows: Rows


@dataclass(frozen=True)
class Setup(Generic[Row]):
    """What a task makes its trainer of."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokens[Row]
    learning_rate: float
    checkpoints: Path
    record: dict[str, Any]
    """What run.json says of the run; a task may add to it."""
    watched: dict[str, Any]
    """What every trainer is watched and kept by."""


class TaskRun(ABC, Generic[Config, Row]):
    """What a run of a task does with its rows; the same for training, plan, data, eval and merge.

    `read_by` comes first, then `learn` with a run's rows or `recall` with a tuned model.
    """

    config: Config
    """The run as this process takes part in it, and as its rows take it."""
    reader: Reader

    def __init__(self, task: Task, config: Config) -> None:
        self.task, self.config = task, config
        self.asked = config
        """The run as the user asked for it."""
        self.share = Share(config.batch_size, config.gradient_accumulation)
        """This process's part of a step."""
        self.images: RowImages | None = None
        """What gives the model the images of rows, where they have some."""
        self.tell: OnEvent = ignore

    def stage(self, message: str) -> None:
        self.tell(Event("stage", message))

    def note(self, message: str) -> None:
        self.tell(Event("note", message))

    def note_lines(self, lines: Sequence[int], what: str) -> None:
        """Report what holds of the rows of these lines, if there are any."""
        if lines:
            self.note(counted(lines, what))

    # Rows

    def read_by(self, folder: Path, pictured: bool) -> None:
        """Take what writes rows as tokens from a model's folder; rows may have images.

        Raises:
            DataError: rows have images, and the model sees none.
            UsageError: rows have images, and the run has a key that these do not know.
        """
        if pictured:
            self.config = with_images(self.config)
        self.reader = reader_for(folder, pictured, getattr(self.config, "max_pixels", None))
        if isinstance(self.reader, ImageReader):
            shape, _ = config_of(self.config.model, self.config.revision)
            self.images = RowImages(self.reader, computing_dtype(shape, self.config.dtype))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.reader.tokenizer

    def learn(self, rows: RunRows) -> None:
        """Learn of all the rows what their encoding needs; raise where the parts do not fit."""

    def recall(self, model: PreTrainedModel, rows: Rows, record: Mapping[str, Any]) -> None:
        """Take what was learned in training from a tuned model and its run.json.

        Raises:
            DataError: the rows are not what the model was trained for.
            ModelError: the model is not one of this task's.
        """
        if self.images is not None:
            self.images.prepare_again(model)

    @abstractmethod
    def encode(self, rows: Rows) -> list[Row]:
        """Return rows as tokens."""

    def check(self, rows: Rows, encoded: list[Row]) -> None:
        """Raise for what would make training on these rows vain; tell what is worth knowing."""

    def check_held_out(self, rows: Rows) -> None:
        """Raise for what would make the comparison at the end vain."""

    @abstractmethod
    def texts(self, row: Row) -> Sequence[Any]:
        """Return a row's sequences, each with its `input_ids`."""

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Return how many tokens the longest sequence of each row has."""
        return [max(len(text.input_ids) for text in self.texts(row)) for row in rows]

    @abstractmethod
    def overview(self, rows: RunRows, show: int) -> Overview:
        """Return what `inlay data` shows: counts, lengths, and some of the training rows."""

    # A step

    @property
    def head(self) -> Head | None:
        """What the model gives in place of its checkpoint's own output, and trains whole."""
        return None

    def arrange(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
        """Return the row numbers of an epoch in the order in which they are trained."""
        return order(lengths, batch_size, seed, epoch)

    @abstractmethod
    def columns(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        """Return rows as the trainer's data set holds them."""

    @abstractmethod
    def collator(self, rows: Sequence[Row], multiple: int) -> Collate:
        """Return what makes a batch of some of these rows, padded to a multiple."""

    def batch_of(
        self, rows: Sequence[Row], numbers: Sequence[int], multiple: int
    ) -> dict[str, Any]:
        """Return the rows of these numbers as one batch, as training does."""
        chosen = [rows[number] for number in numbers]
        return self.collator(chosen, multiple)(items_of(self.columns(chosen)))

    def planned_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return a batch as `loss` takes it; values that depend on others are worked out here."""
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return a loss that holds and computes what the trainer's does."""

    @abstractmethod
    def trained_tokens(self, rows: Sequence[Row]) -> int:
        """Return how many tokens, or labels, are learned from."""

    @abstractmethod
    def full_row(self) -> Row:
        """Return a row as long as the run and the model allow."""

    def changed(self, config: Config) -> Self:
        """Return the same run under keys that change nothing about its rows as tokens."""
        found = copy(self)
        found.config = config if self.images is None else with_images(config)
        found.share = Share(config.batch_size, config.gradient_accumulation)
        return found

    def to_plan(self, rows: Sequence[Row], device: Device) -> PlannedRows:
        """Return the largest batch that training takes, or one of full rows where there are none.

        Args:
            rows: the training rows as tokens; none where they are not known.
            device: where the run takes place.
        """
        if not rows:
            return self.assumed()
        numbers = largest_batch(self.config, self.lengths(rows), self.arrange)
        batch = self.batch_of(rows, numbers, padding_multiple(self.config, device))
        every = [text for row in rows for text in self.texts(row)]
        kept = 0
        if self.images is not None:
            here = [text for number in numbers for text in self.texts(rows[number])]
            kept = self.images.kept_bytes(here, every)
        return PlannedRows(
            self.config,
            self.planned_inputs(batch),
            self.loss,
            count=len(rows),
            tokens=sum(len(text.input_ids) for text in every),
            trained_tokens=self.trained_tokens(rows),
            head=self.head,
            row_bytes=kept,
        )

    def assumed(self) -> PlannedRows:
        """Return a batch of full rows; there are as many as `max_rows` lets in, if it says."""
        config, row = self.config, self.full_row()
        batch = self.batch_of([row] * config.batch_size, range(config.batch_size), 1)
        count = int((config.max_rows or 0) * (1.0 if config.eval_data else config.split[0]))
        tokens = sum(len(text.input_ids) for text in self.texts(row))
        return PlannedRows(
            config,
            self.planned_inputs(batch),
            self.loss,
            count=count,
            tokens=count * tokens,
            trained_tokens=0,
            head=self.head,
            assumed=True,
        )

    def rows_come_again(self, rows: int) -> bool:
        """Return whether the run passes over so many rows more than once."""
        steps = self.config.max_steps or math.inf
        passes = steps * self.config.batch_size * self.config.gradient_accumulation / rows
        return min(passes, self.config.epochs) > 1

    # Training

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise where what the task trains on would teach this model nothing."""

    def prepare(self, model: PreTrainedModel, tokens: Tokens[Row], record: dict[str, Any]) -> None:
        """Make the loaded model ready in the task's own way."""

    @abstractmethod
    def trainer(self, setup: Setup[Row]) -> AdapterLoop:
        """Return the trainer, nothing trained yet."""

    def images_come_again(self, rows: int) -> bool:
        """Return whether the run sees the images of its rows more than once."""
        return self.rows_come_again(rows)

    def keep_features(self, setup: Setup[Row]) -> None:
        """Keep what a frozen vision tower gives for every row, where that pays or is asked for.

        Raises:
            UsageError: the run asks for that, and this model cannot have it.
        """
        if self.images is None:
            return
        self.images.prepare_again(setup.model)
        wanted = getattr(self.config, "cache_vision", False)
        tokens = setup.tokens
        if not wanted or (wanted == "auto" and not self.images_come_again(len(tokens.train))):
            return
        self.stage("running the vision tower once over every row")
        rows = [self.texts(row)[0] for row in [*tokens.train, *tokens.validation]]
        required = wanted != "auto"
        self.images.keep(setup.model, rows, setup.checkpoints, required, self.note)

    def reading(self) -> AbstractContextManager[None]:
        """Return the context in which the model reads what is kept for it."""
        return nullcontext() if self.images is None else self.images.reading()

    def around(self, setup: Setup[Row]) -> AbstractContextManager[None]:
        """Return the context that the steps are taken in."""
        del setup
        return nullcontext() if self.images is None else self.images.used()

    def inputs(self) -> dict[str, str]:
        """Return hashes of what else the task reads, which a resumed run must find the same."""
        return {}

    # Measuring

    def answer_at_most(self, tokens: int) -> None:
        """Draw answers of at most so many tokens, where the run's own metrics draw some."""

    def limits(self) -> Limits:
        """Return how much is measured at a time at the end of a run."""
        return {"batch_size": max(self.config.batch_size, 8)}

    @abstractmethod
    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[Row], limits: Limits
    ) -> ComparisonRecord:
        """Return base against tuned on rows."""

    def answers(self, rows: Rows) -> Rows:
        """Return rows with the one answer each that the model should give."""
        return rows

    @abstractmethod
    def merge_inputs(self, model: PreTrainedModel, rows: Rows) -> list[dict[str, Tensor]]:
        """Return rows as the calls that a merged model is compared on, one row each."""

    def finish_merged(self, model: PreTrainedModel, folder: Path) -> None:
        """Add to a merged model's folder what the task needs there."""


def ignore(event: Event) -> None:
    """Ignore the event."""
