"""A run on preferences: the answer that is preferred rather than the other, by TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from inlay.data.preference import side_of
from inlay.data.rows import Rows
from inlay.data.summary import summarise
from inlay.data.tokens import Encoded
from inlay.evaluate.comparison import Limits
from inlay.evaluate.images import joining
from inlay.evaluate.losses import PADDING
from inlay.evaluate.record import ComparisonRecord
from inlay.model.adapters.attach import disabled
from inlay.model.fast.padding import length_multiple
from inlay.tasks.dpo import PreferenceConfig
from inlay.tasks.dpo.compare import Preferences, compare_pairs, log_probs
from inlay.tasks.dpo.pairs import Pair, encode_pairs
from inlay.tasks.dpo.trainer import PreferenceTrainer, columns
from inlay.train.answers import check_answers
from inlay.train.arguments import shared
from inlay.train.collate import Collate, WithImages
from inlay.train.language_run import LanguageRun, Sides
from inlay.train.reference import labelled_inputs
from inlay.train.task_run import Setup
from inlay.train.trainer import AdapterLoop, HeldOut


class DpoRun(LanguageRun[PreferenceConfig, Pair]):
    """A run that trains a model to prefer one answer to another."""

    def encode(self, rows: Rows) -> list[Pair]:
        return encode_pairs(rows, self.reader, self.config.max_length)

    def check(self, rows: Rows, encoded: list[Pair]) -> None:
        chosen = summarise([pair.chosen for pair in encoded], rows)
        rejected = summarise([pair.rejected for pair in encoded], rows)
        kinds, longest = ("preferred", "rejected"), self.config.max_length
        check_answers(chosen, rejected, kinds, longest, rows.source, self.note_lines)

    def texts(self, row: Pair) -> Sequence[Encoded]:
        return [row.chosen, row.rejected]

    def sides(self, rows: Rows, encoded: list[Pair]) -> Sides:
        return {
            "chosen": (rows, [pair.chosen for pair in encoded]),
            "rejected": (rows, [pair.rejected for pair in encoded]),
        }

    # A step

    def columns(self, rows: Sequence[Pair]) -> dict[str, list[Any]]:
        return columns(rows)

    def collator(self, rows: Sequence[Pair], multiple: int) -> Collate:
        collate = DataCollatorForPreference(PADDING, pad_to_multiple_of=multiple)
        if self.images is None:
            return collate
        inputs = self.images.inputs

        def seen(numbers: Sequence[int], batch: dict[str, Any]) -> dict[str, Tensor]:
            pairs = [rows[number] for number in numbers]
            texts = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
            return inputs(texts, width=batch["input_ids"].shape[1])

        return WithImages(collate, seen)

    def planned_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return labelled_inputs(batch)

    def full_row(self) -> Pair:
        length = self.config.max_length
        row = Encoded([0] * length, [True] * length, length)
        return Pair(row, row)

    # Training

    def images_come_again(self, rows: int) -> bool:
        """Return True: both answers show each image, and so does the reference."""
        del rows
        return True

    def trainer(self, setup: Setup[Pair]) -> AdapterLoop:
        model, pairs = setup.model, setup.tokens.train
        return PreferenceTrainer(
            model,
            setup.tokenizer,
            pairs,
            DPOConfig(
                **shared(DPOConfig, self.config, model, setup.checkpoints, setup.learning_rate),
                beta=self.config.beta,
                loss_type=["sigmoid"],
                disable_dropout=True,
                precompute_ref_log_probs=True,
                max_length=None,
                remove_unused_columns=False,
            ),
            collate=self.collator(pairs, length_multiple(model)),
            held_out=self.held_out(model, setup.tokens.validation),
            **setup.watched,
        )

    def held_out(self, model: PreTrainedModel, pairs: list[Pair]) -> HeldOut | None:
        if not pairs:
            return None
        size, join = max(self.config.batch_size, 8), joining(self.seeing)
        with disabled(model):
            reference = log_probs(model, pairs, size, join=join)

        def measure() -> Mapping[str, float]:
            found = log_probs(model, pairs, size, join=join)
            return Preferences(found, reference, self.config.beta).means()

        return measure

    # Measuring

    def answers(self, rows: Rows) -> Rows:
        return side_of(rows, "chosen")

    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[Pair], limits: Limits
    ) -> ComparisonRecord:
        return compare_pairs(
            model,
            self.tokenizer,
            self.answers(rows),
            encoded,
            beta=self.config.beta,
            **{**limits, "seeing": self.seeing},
        )
