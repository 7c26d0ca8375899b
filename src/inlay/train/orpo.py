"""A run on preferences without a reference: answers and their odds, by TRL's ORPOTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from inlay.data.preference import Pair
from inlay.evaluate.images import joining
from inlay.evaluate.odds import compare_odds, odds_ratios
from inlay.evaluate.record import ComparisonRecord
from inlay.train import dpo
from inlay.train.arguments import shared
from inlay.train.orpo_trainer import CountingPrompts, OddsTrainer, ORPOConfig
from inlay.train.trainer import AdapterLoop, HeldOut


class Stages(dpo.Stages):
    """A run that trains preferred answers, and to prefer them, at once."""

    loop: ClassVar[Callable[..., AdapterLoop]] = OddsTrainer
    compare: ClassVar[Callable[..., ComparisonRecord]] = staticmethod(compare_odds)

    def collate(self, model: PreTrainedModel, pairs: list[Pair]) -> Callable[..., Any]:
        """Return what makes a batch of pairs, which knows what counts of a preferred row."""
        return CountingPrompts(super().collate(model, pairs), pairs)

    def arguments(self, model: PreTrainedModel, learning_rate: float) -> ORPOConfig:
        """Return TRL's arguments; its `beta` is the paper's lambda."""
        return ORPOConfig(
            **shared(ORPOConfig, self.config, model, self.folder.checkpoints, learning_rate),
            beta=self.beta,
            disable_dropout=True,
            max_length=self.config.max_length,
            remove_unused_columns=False,
        )

    def held_out(self, model: PreTrainedModel, pairs: list[Pair]) -> HeldOut | None:
        """Return what measures the loss on held-out pairs, or None when there are none."""
        if not pairs:
            return None
        size, join = max(self.config.batch_size, 8), joining(self.seeing)

        def measure() -> Mapping[str, float]:
            return odds_ratios(model, pairs, size, self.beta, join=join).means()

        return measure
