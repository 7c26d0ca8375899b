"""TRL's RewardTrainer on a model with a head and adapters of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from inlay.data.inputs import InputRow
from inlay.evaluate.outputs import padded_inputs
from inlay.tasks.reward.pairs import RewardPair
from inlay.train.collate import Items
from inlay.train.reference import Telling


class RewardLoop(Telling, RewardTrainer):
    """Trains on pairs that come tokenised from the data room."""

    shown: ClassVar[Mapping[str, str]] = {"accuracy": "reward_accuracy", "margin": "reward_margin"}

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        columns: Mapping[str, Sequence[Any]],
        args: RewardConfig,
        **kept: Any,
    ) -> None:
        super().__init__(model, tokenizer, Dataset.from_dict(dict(columns)), args, **kept)

    @property
    def lengths(self) -> list[int]:
        assert isinstance(self.train_dataset, Dataset)
        sides = (self.train_dataset[name] for name in ("chosen_ids", "rejected_ids"))
        return [max(len(a), len(b)) for a, b in zip(*sides, strict=True)]


@dataclass(frozen=True)
class PadPairs:
    """Pads every chosen side and then every rejected one, as TRL's own collator does."""

    padding: int
    multiple: int

    def __call__(self, rows: Items) -> dict[str, Tensor]:
        """Return input_ids and attention_mask, each (2 * pairs, longest)."""
        sides = [row[name] for name in ("chosen_ids", "rejected_ids") for row in rows]
        texts = [InputRow(ids, len(ids)) for ids in sides]
        return padded_inputs(texts, self.padding, self.multiple)


def columns(pairs: Sequence[RewardPair]) -> dict[str, list[Any]]:
    return {
        "chosen_ids": [pair.chosen.input_ids for pair in pairs],
        "rejected_ids": [pair.rejected.input_ids for pair in pairs],
    }
