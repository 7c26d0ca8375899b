"""A supervised run's own stages: answers, texts or conversations, by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.rows import Rows
from inlay.data.tokens import Encoded, Summary, summarise
from inlay.errors import DataError, TrainingError, UsageError
from inlay.evaluate.losses import losses
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.run import compare
from inlay.memory.devices import Device
from inlay.model.fast.packing import mixes_rows
from inlay.model.fast.padding import length_multiple
from inlay.model.load.eight_bits import ACCEPTED, compute_in_8_bits, gate
from inlay.model.trunk import Trunk, trunk_of
from inlay.train import planning
from inlay.train.arguments import arguments
from inlay.train.collate import Concatenate
from inlay.train.rows import encode_rows
from inlay.train.running import Running, Tokens
from inlay.train.trainer import AdapterTrainer, HeldOut
from inlay.train.trunk_cache import TrunkCache, cached_trunk

GATE_ROWS = 64
"""Rows that the loss in 8 bits is measured on."""
TRUNK = "trunk.tmp"
"""The file that a kept trunk takes if it does not fit in memory; what a kill leaves is removed."""


class Stages(Running[Encoded]):
    """A run that trains answers as the rows give them."""

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        """Return rows as tokens."""
        return encode_rows(rows, tokenizer, self.config.max_length)

    def check_rows(self, rows: Rows, encoded: list[Encoded]) -> None:
        """Raise when no row trains the end token; tell of rows that were cut or left out."""
        summary = summarise(encoded, rows)
        check_ends(summary, rows, self.config.max_length)
        for lines, what in (
            (summary.truncated, f"cut at max_length {self.config.max_length}"),
            (summary.skipped, "left out: a field is empty"),
            (summary.unended, "without a trained end token"),
            (summary.unlike_prompt, "with a prompt that is tokenised otherwise on its own"),
        ):
            self.note_lines(lines, what)

    def largest(self, encoded: list[Encoded], device: Device) -> planning.Rows:
        """Return the largest batch, or one of full length where rows are packed into it."""
        if self.config.packing == "bfd":
            return planning.assumed_rows(self.config)
        multiple = planning.padding_multiple(self.config, device)
        return planning.rows_to_plan(self.config, encoded, multiple)

    def prepare(
        self, model: PreTrainedModel, tokens: Tokens[Encoded], record: dict[str, Any]
    ) -> None:
        """Turn products in 8 bits on, if the run asks for them."""
        if self.config.eight_bits:
            record["eight_bits"] = self.in_eight_bits(model, tokens)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[Encoded],
        record: dict[str, Any],
    ) -> AdapterTrainer:
        """Return the trainer, nothing trained yet."""
        config, rate = self.config, record["learning_rate"]["value"]
        return AdapterTrainer(
            model,
            tokenizer,
            tokens.train,
            arguments(config, model, self.folder.checkpoints, rate),
            collate=self.collate(model, tokens),
            held_out=held_out(model, tokens.validation, config.batch_size),
            **self.watched(),
        )

    def collate(self, model: PreTrainedModel, tokens: Tokens[Encoded]) -> Concatenate | None:
        """Return what joins a batch's rows without padding; None leaves the batch to TRL.

        Raises:
            UsageError: the run asks for packing, and rows would see each other.
        """
        packing = self.config.packing
        mixed = mixes_rows(model, [row.input_ids for row in tokens.train]) if packing else None
        if mixed is not None and packing != "auto":
            raise UsageError(f"'packing' would mix rows: {mixed}; leave packing at auto")
        if mixed is not None:
            self.note(f"batches are padded, not packed: {mixed}")
        if packing in (False, "bfd") or mixed is not None:
            return None
        return Concatenate(length_multiple(model))

    @contextmanager
    def around(self, model: PreTrainedModel, tokens: Tokens[Encoded]) -> Generator[None]:
        """Take the steps with the frozen blocks' output read, then leave products exact."""
        with self.trunk(model, tokens):
            yield
        if self.config.eight_bits:
            compute_in_8_bits(model, on=False)

    def trunk(
        self, model: PreTrainedModel, tokens: Tokens[Encoded]
    ) -> AbstractContextManager[None]:
        """Return the context in which the blocks below the lowest adapted one are read, not run.

        Raises:
            UsageError: the run asks for that, and this model cannot have it.
        """
        wanted = self.config.cache_trunk
        if not wanted or (wanted == "auto" and not self.trunk_cache_pays(model, len(tokens.train))):
            return nullcontext()
        self.stage("running the frozen blocks once over every row")
        rows = [*tokens.train, *tokens.validation]
        cache = cached_trunk(model, rows, len(tokens.train), self.folder.checkpoints / TRUNK)
        if isinstance(cache, TrunkCache):
            self.note(str(cache))
            return cache.used()
        if wanted == "auto":
            self.note(f"the frozen blocks run in every epoch: {cache}")
            return nullcontext()
        raise UsageError(f"'cache_trunk' cannot be used: {cache}; leave it at auto")

    def trunk_cache_pays(self, model: PreTrainedModel, rows: int) -> bool:
        """Say whether at least the lower half of the blocks is frozen and rows come again."""
        trunk = trunk_of(model)
        return (
            isinstance(trunk, Trunk)
            and 2 * trunk.depth >= len(trunk.blocks)
            and self.rows_come_again(rows)
        )

    def in_eight_bits(self, model: PreTrainedModel, tokens: Tokens[Encoded]) -> dict[str, float]:
        """Turn products in 8 bits on, if they leave the loss on this run's rows as it is.

        Raises:
            TrainingError: the loss differs by more than is accepted.
        """
        rows = (tokens.validation or tokens.train)[:GATE_ROWS]
        measured = gate(model, lambda: mean_loss(model, rows, self.config.batch_size))
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

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[Encoded]
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
        ).to_dict()


def check_ends(summary: Summary, rows: Rows, max_length: int) -> None:
    """Raise when no row trains the token at which generation stops."""
    if summary.ends_trained == 0:
        raise DataError(
            f"{rows.source}: no row trains the token at which generation stops, so the tuned "
            f"model would never stop: {len(summary.truncated)} of {summary.rows} rows are cut "
            f"at max_length {max_length}; the longest has {summary.lengths.max} tokens"
        )


def held_out(model: PreTrainedModel, rows: list[Encoded], batch_size: int) -> HeldOut | None:
    """Return what measures the mean loss of held-out rows, or None when there are none."""
    if not rows:
        return None
    return lambda: {"loss": mean_loss(model, rows, batch_size)}


def mean_loss(model: PreTrainedModel, rows: list[Encoded], batch_size: int) -> float:
    """Return the loss of rows, in nats a trained token."""
    found = losses(model, rows, max(batch_size, 8))
    return sum(row.nll for row in found) / sum(row.tokens for row in found)
