"""A run on preferences without a reference: answers and their odds, by TRL's ORPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from inlay.data.rows import Rows
from inlay.evaluate.comparison import Limits
from inlay.evaluate.images import joining
from inlay.evaluate.record import ComparisonRecord
from inlay.model.fast.padding import length_multiple
from inlay.tasks.dpo.pairs import Pair
from inlay.tasks.dpo.run import DpoRun
from inlay.tasks.orpo.compare import compare_odds, odds_ratios
from inlay.tasks.orpo.trainer import CountingPrompts, OddsTrainer, ORPOConfig, counted_labels
from inlay.train.arguments import shared
from inlay.train.collate import Collate
from inlay.train.task_run import Setup
from inlay.train.trainer import AdapterLoop, HeldOut


class OrpoRun(DpoRun):
    """A run that trains preferred answers, and to prefer them, at once."""

    def trained_tokens(self, rows: Sequence[Pair]) -> int:
        both = [text for pair in rows for text in (pair.whole, pair.rejected)]
        return sum(text.trained_tokens for text in both)

    def collator(self, rows: Sequence[Pair], multiple: int) -> Collate:
        """Return the collator of pairs whose preferred rows count their prompt, too."""
        return CountingPrompts(super().collator(rows, multiple), rows)

    def planned_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {**super().planned_inputs(batch), "labels": counted_labels(batch)}

    def trainer(self, setup: Setup[Pair]) -> AdapterLoop:
        """Return the trainer; TRL's `beta` is the paper's lambda."""
        model, pairs = setup.model, setup.tokens.train
        return OddsTrainer(
            model,
            setup.tokenizer,
            pairs,
            ORPOConfig(
                **shared(ORPOConfig, self.config, model, setup.checkpoints, setup.learning_rate),
                beta=self.config.beta,
                disable_dropout=True,
                max_length=self.config.max_length,
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

        def measure() -> Mapping[str, float]:
            return odds_ratios(model, pairs, size, self.config.beta, join=join).means()

        return measure

    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[Pair], limits: Limits
    ) -> ComparisonRecord:
        return compare_odds(
            model,
            self.tokenizer,
            self.answers(rows),
            encoded,
            beta=self.config.beta,
            **{**limits, "seeing": self.seeing},
        )
