"""A run on preferences: the answer that is preferred rather than the other, by TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl.trainer.dpo_config import DPOConfig

from inlay.data.preference import Pair, side_of
from inlay.data.rows import Rows
from inlay.data.tokens import summarise
from inlay.evaluate.images import joining
from inlay.evaluate.preference import Preferences, compare_pairs, log_probs
from inlay.evaluate.record import ComparisonRecord
from inlay.memory.devices import Device
from inlay.model.adapters.attach import disabled
from inlay.model.fast.padding import length_multiple
from inlay.train import planning
from inlay.train.answers import check_answers
from inlay.train.arguments import shared
from inlay.train.preference_trainer import PreferenceTrainer, preference_batch
from inlay.train.rows import encode_pair_rows
from inlay.train.running import Running, Tokens
from inlay.train.trainer import AdapterLoop, HeldOut


class Stages(Running[Pair]):
    """A run that trains a model to prefer one answer to another."""

    loop: ClassVar[Callable[..., AdapterLoop]] = PreferenceTrainer
    compare: ClassVar[Callable[..., ComparisonRecord]] = staticmethod(compare_pairs)

    @property
    def beta(self) -> float:
        """How near the model is held to the base."""
        assert self.config.beta is not None
        return self.config.beta

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
        """Return rows as tokens."""
        return encode_pair_rows(rows, tokenizer, self.config.max_length)

    def check_rows(self, rows: Rows, encoded: list[Pair]) -> None:
        """Raise when no preferred answer ends; tell of rows that were cut or left out."""
        chosen = summarise([pair.chosen for pair in encoded], rows)
        rejected = summarise([pair.rejected for pair in encoded], rows)
        kinds, longest = ("preferred", "rejected"), self.config.max_length
        check_answers(chosen, rejected, kinds, longest, rows.source, self.note_lines)

    def largest(self, encoded: list[Pair], device: Device) -> planning.Rows:
        """Return the largest batch, both sides of each pair in it."""
        multiple = planning.padding_multiple(self.config, device)
        return planning.pairs_to_plan(self.config, encoded, multiple)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[Pair],
        record: dict[str, Any],
    ) -> AdapterLoop:
        """Return the trainer, nothing trained yet; the reference is measured here."""
        return self.loop(
            model,
            tokenizer,
            tokens.train,
            self.arguments(model, record["learning_rate"]["value"]),
            collate=self.collate(model, tokens.train),
            held_out=self.held_out(model, tokens.validation),
            **self.watched(),
        )

    def collate(self, model: PreTrainedModel, pairs: list[Pair]) -> Callable[..., Any]:
        """Return what makes a batch of pairs: every chosen side, then every rejected one."""
        del pairs
        return preference_batch(length_multiple(model))

    def arguments(self, model: PreTrainedModel, learning_rate: float) -> TrainingArguments:
        """Return TRL's arguments; the loss is the sigmoid one of the paper."""
        return DPOConfig(
            **shared(DPOConfig, self.config, model, self.folder.checkpoints, learning_rate),
            beta=self.beta,
            loss_type=["sigmoid"],
            disable_dropout=True,
            precompute_ref_log_probs=True,
            max_length=None,
        )

    def held_out(self, model: PreTrainedModel, pairs: list[Pair]) -> HeldOut | None:
        """Return what measures the loss on held-out pairs, or None when there are none."""
        if not pairs:
            return None
        size, join = max(self.config.batch_size, 8), joining(self.seeing)
        with disabled(model):
            reference = log_probs(model, pairs, size, join=join)

        def measure() -> Mapping[str, float]:
            found = log_probs(model, pairs, size, join=join)
            return Preferences(found, reference, self.beta).means()

        return measure

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[Pair]
    ) -> ComparisonRecord:
        """Return base against tuned on the test rows."""
        return self.compare(
            model,
            tokenizer,
            side_of(tokens.test_rows, "chosen"),
            tokens.test,
            beta=self.beta,
            generate_rows=self.config.generate_rows,
            max_new_tokens=self.config.generate_tokens,
            batch_size=max(self.config.batch_size, 8),
            seeing=self.seeing,
        )
