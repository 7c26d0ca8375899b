"""A supervised run: answers, texts or conversations, by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from inlay.data.rows import Rows
from inlay.data.summary import Summary, summarise
from inlay.data.tokens import Encoded, encode
from inlay.errors import DataError, TrainingError, UsageError
from inlay.evaluate.comparison import Limits
from inlay.evaluate.images import joining
from inlay.evaluate.losses import losses
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.supervised import compare
from inlay.memory.devices import Device
from inlay.model.fast.packing import mixes_rows
from inlay.model.fast.padding import length_multiple
from inlay.model.load.eight_bits import ACCEPTED, compute_in_8_bits, gate
from inlay.model.trunk import Trunk, trunk_of
from inlay.run.config import RunWithImages
from inlay.tasks.sft.trainer import SupervisedTrainer, arguments
from inlay.train.collate import Collate, Concatenated, Padded, WithImages, labels
from inlay.train.features.trunk import TrunkCache, cached_trunk
from inlay.train.language_run import LanguageRun
from inlay.train.planning import PlannedRows
from inlay.train.task_run import Setup, Tokens
from inlay.train.trainer import HeldOut

GATE_ROWS = 64
"""Rows that the loss in 8 bits is measured on."""
TRUNK = "trunk.tmp"
"""The file that a kept trunk takes if it does not fit in memory; what a kill leaves is removed."""


class SftRun(LanguageRun[RunWithImages, Encoded]):
    """A run that trains answers as the rows give them."""

    packed = True
    """Whether the model keeps rows apart that stand in one sequence."""

    def encode(self, rows: Rows) -> list[Encoded]:
        return encode(rows, self.reader, self.config.max_length)

    def check(self, rows: Rows, encoded: list[Encoded]) -> None:
        summary = summarise(encoded, rows)
        check_ends(summary, rows, self.config.max_length)
        for lines, what in (
            (summary.truncated, f"cut at max_length {self.config.max_length}"),
            (summary.skipped, "left out: a field is empty"),
            (summary.unended, "without a trained end token"),
            (summary.unlike_prompt, "with a prompt that is tokenised otherwise on its own"),
        ):
            self.note_lines(lines, what)

    def texts(self, row: Encoded) -> Sequence[Encoded]:
        return [row]

    # A step

    def columns(self, rows: Sequence[Encoded]) -> dict[str, list[Any]]:
        return {
            "row": list(range(len(rows))),
            "input_ids": [row.input_ids for row in rows],
            "labels": [labels(row) for row in rows],
        }

    def collator(self, rows: Sequence[Encoded], multiple: int) -> Collate:
        if self.images is not None:
            inputs = self.images.inputs

            def seen(numbers: Sequence[int], batch: dict[str, Any]) -> dict[str, Tensor]:
                width = batch["input_ids"].shape[1]
                return inputs([rows[number] for number in numbers], width=width)

            return WithImages(Padded(multiple), seen)
        return Concatenated(multiple) if self.config.packing and self.packed else Padded(multiple)

    def planned_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {name: value for name, value in batch.items() if name != "padding"}

    def full_row(self) -> Encoded:
        length = self.config.max_length
        return Encoded([0] * length, [True] * length, length)

    def to_plan(self, rows: Sequence[Encoded], device: Device) -> PlannedRows:
        """Return the largest batch, or one of full length where rows are packed into it."""
        return super().to_plan([] if self.config.packing == "bfd" else rows, device)

    # Training

    def prepare(
        self, model: PreTrainedModel, tokens: Tokens[Encoded], record: dict[str, Any]
    ) -> None:
        """Turn products in 8 bits on, if the run asks for them; see whether rows can be packed."""
        if self.config.eight_bits:
            record["eight_bits"] = self.in_eight_bits(model, tokens)
        packing = self.config.packing
        mixed = mixes_rows(model, [row.input_ids for row in tokens.train]) if packing else None
        if mixed is not None and packing != "auto":
            raise UsageError(f"'packing' would mix rows: {mixed}; leave packing at auto")
        if mixed is not None:
            self.note(f"batches are padded, not packed: {mixed}")
        self.packed = mixed is None

    def trainer(self, setup: Setup[Encoded]) -> SupervisedTrainer:
        model, tokens, config = setup.model, setup.tokens, self.config
        args = arguments(config, model, setup.checkpoints, setup.learning_rate)
        args.remove_unused_columns = self.images is None
        bins = config.packing == "bfd"
        collate = None if bins else self.collator(tokens.train, length_multiple(model))
        columns = self.columns(tokens.train)
        if self.images is None:
            columns.pop("row")
        return SupervisedTrainer(
            model,
            setup.tokenizer,
            columns,
            args,
            collate=collate,
            held_out=self.held_out(model, tokens.validation),
            **setup.watched,
        )

    def held_out(self, model: PreTrainedModel, rows: list[Encoded]) -> HeldOut | None:
        return (lambda: {"loss": self.mean_loss(model, rows)}) if rows else None

    def mean_loss(self, model: PreTrainedModel, rows: list[Encoded]) -> float:
        """Return the loss in nats a trained token."""
        found = losses(model, rows, max(self.config.batch_size, 8), join=joining(self.seeing))
        return sum(row.nll for row in found) / sum(row.tokens for row in found)

    @contextmanager
    def around(self, setup: Setup[Encoded]) -> Generator[None]:
        """Take the steps with the frozen blocks' output read, then make products exact again."""
        with super().around(setup), self.trunk(setup):
            yield
        if self.config.eight_bits:
            compute_in_8_bits(setup.model, on=False)

    def trunk(self, setup: Setup[Encoded]) -> AbstractContextManager[None]:
        """Return the context in which the blocks below the lowest adapted one are read, not run."""
        wanted, model, tokens = self.config.cache_trunk, setup.model, setup.tokens
        pays = self.images is None and self.trunk_cache_pays(model, len(tokens.train))
        if not wanted or (wanted == "auto" and not pays):
            return nullcontext()
        self.stage("running the frozen blocks once over every row")
        rows = [*tokens.train, *tokens.validation]
        cache = cached_trunk(model, rows, len(tokens.train), setup.checkpoints / TRUNK)
        if isinstance(cache, TrunkCache):
            self.note(str(cache))
            return cache.used()
        if wanted == "auto":
            self.note(f"the frozen blocks run in every epoch: {cache}")
            return nullcontext()
        raise UsageError(f"'cache_trunk' cannot be used: {cache}; leave it at auto")

    def trunk_cache_pays(self, model: PreTrainedModel, rows: int) -> bool:
        """Return whether at least the lower half of the blocks is frozen and rows come again."""
        trunk = trunk_of(model)
        return (
            isinstance(trunk, Trunk)
            and 2 * trunk.depth >= len(trunk.blocks)
            and self.rows_come_again(rows)
        )

    def in_eight_bits(self, model: PreTrainedModel, tokens: Tokens[Encoded]) -> dict[str, float]:
        """Turn products in 8 bits on, if they leave the loss on this run's rows as it is."""
        rows = (tokens.validation or tokens.train)[:GATE_ROWS]
        measured = gate(model, lambda: self.mean_loss(model, rows))
        found = (
            f"{measured.loss:.4f} as stored, {measured.loss_in_8_bits:.4f} in 8 bits, "
            f"a difference of {measured.difference:.2%}"
        )
        if not measured.passed:
            raise TrainingError(
                f"products in 8 bits change the loss on {len(rows)} of this run's rows: {found}; "
                f"at most {ACCEPTED:.1%} is accepted. Leave eight_bits off"
            )
        self.note(f"products in 8 bits: the loss on {len(rows)} rows is {found}")
        return {"loss": measured.loss, "loss_in_8_bits": measured.loss_in_8_bits}

    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[Encoded], limits: Limits
    ) -> ComparisonRecord:
        seen: Limits = {**limits, "seeing": self.seeing}
        found = compare(model, self.tokenizer, rows, encoded, **seen)
        return found.to_dict()


def check_ends(summary: Summary, rows: Rows, max_length: int) -> None:
    """Raise when no row trains the token at which generation stops."""
    if summary.ends_trained == 0:
        raise DataError(
            f"{rows.source}: no row trains the token at which generation stops, so the tuned "
            f"model would never stop: {len(summary.truncated)} of {summary.rows} rows are cut "
            f"at max_length {max_length}; the longest has {summary.lengths.max} tokens"
        )
