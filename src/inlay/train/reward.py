"""A run on preferences that trains a reward model: one number a row, by TRL's RewardTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from inlay.data.rows import Rows
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.reward_model import compare_rewards, held_out_rewards
from inlay.memory.devices import Device
from inlay.model.fast.padding import length_multiple
from inlay.model.load.heads import Head
from inlay.train import planning
from inlay.train.arguments import shared
from inlay.train.head_planning import longest_row
from inlay.train.reference import Telling
from inlay.train.reward_pairs import RewardPair, encode_reward_pairs, pairs_to_plan, reward_head
from inlay.train.rows import RunRows
from inlay.train.running import Running, Tokens
from inlay.train.trainer import HeldOut


class RewardLoop(Telling, RewardTrainer):
    """Trains on pairs that come tokenised from the data room."""

    shown: ClassVar[Mapping[str, str]] = {"accuracy": "reward_accuracy", "margin": "reward_margin"}

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[RewardPair],
        args: RewardConfig,
        **kept: Any,
    ) -> None:
        super().__init__(model, tokenizer, dataset(pairs), args, **kept)

    @property
    def lengths(self) -> list[int]:
        """How many tokens the longer side of each pair has."""
        assert isinstance(self.train_dataset, Dataset)
        sides = (self.train_dataset[name] for name in ("chosen_ids", "rejected_ids"))
        return [max(len(a), len(b)) for a, b in zip(*sides, strict=True)]


def dataset(pairs: Sequence[RewardPair]) -> Dataset:
    """Return pairs as TRL takes them when they are tokenised already."""
    return Dataset.from_dict(
        {
            "chosen_ids": [pair.chosen.input_ids for pair in pairs],
            "rejected_ids": [pair.rejected.input_ids for pair in pairs],
        }
    )


class Stages(Running[RewardPair]):
    """A run that trains a model to give the better answer more."""

    longest: int

    @property
    def head(self) -> Head:
        """One number a row."""
        return reward_head(self.config.seed)

    def look_at(self, rows: RunRows, tokenizer: PreTrainedTokenizerBase) -> None:
        """Learn how long a row may be."""
        del rows
        self.longest = longest_row(self.config, tokenizer)

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[RewardPair]:
        """Return rows as tokens."""
        return encode_reward_pairs(rows, tokenizer, self.longest)

    def check_rows(self, rows: Rows, encoded: list[RewardPair]) -> None:
        """Tell of rows that were cut or left out."""
        if self.longest < self.config.max_length:
            self.note(f"the model takes rows of {self.longest} tokens, fewer than max_length")
        for side in ("chosen", "rejected"):
            cut = [
                line
                for pair, line in zip(encoded, rows.lines, strict=True)
                if getattr(pair, side).truncated
            ]
            self.note_lines(cut, f"whose {side} answer is cut at {self.longest} tokens")
        self.note_lines(rows.skipped, "left out: a field is empty")

    def largest(self, encoded: list[RewardPair], device: Device) -> planning.Rows:
        """Return the largest batch, both sides of each pair in it."""
        multiple = planning.padding_multiple(self.config, device)
        return pairs_to_plan(self.config, encoded, multiple)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[RewardPair],
        record: dict[str, Any],
    ) -> RewardLoop:
        """Return the trainer, nothing trained yet."""
        return RewardLoop(
            model,
            tokenizer,
            tokens.train,
            self.arguments(model, record["learning_rate"]["value"]),
            held_out=self.held_out(model, tokens.validation),
            **self.watched(),
        )

    def arguments(self, model: PreTrainedModel, learning_rate: float) -> RewardConfig:
        """Return TRL's arguments; dropout is off, as in TRL."""
        return RewardConfig(
            **shared(RewardConfig, self.config, model, self.folder.checkpoints, learning_rate),
            disable_dropout=True,
            max_length=None,
            pad_to_multiple_of=length_multiple(model),
        )

    def held_out(self, model: PreTrainedModel, pairs: list[RewardPair]) -> HeldOut | None:
        """Return what measures held-out pairs, or None when there are none."""
        if not pairs:
            return None
        size = max(self.config.batch_size, 8)
        return lambda: held_out_rewards(model, pairs, size)

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[RewardPair]
    ) -> ComparisonRecord:
        """Return base against tuned on the test rows."""
        del tokenizer
        return compare_rewards(
            model,
            tokens.test,
            lines=tokens.test_rows.lines,
            batch_size=max(self.config.batch_size, 8),
        )
