"""A run on preferences that trains a reward model: one number a row, by TRL's RewardTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.reward_config import RewardConfig

from inlay.data.inputs import InputRow
from inlay.data.preference import SIDES
from inlay.data.rows import Rows
from inlay.errors import ModelError
from inlay.evaluate.comparison import Limits, pace
from inlay.evaluate.outputs import accepted, padded_inputs
from inlay.evaluate.record import ComparisonRecord
from inlay.model.fast.padding import length_multiple
from inlay.model.load.heads import Head, head_of
from inlay.run.config import RunConfig
from inlay.tasks.reward.compare import compare_rewards, held_out_rewards
from inlay.tasks.reward.pairs import RewardPair, encode_reward_pairs
from inlay.tasks.reward.trainer import PadPairs, RewardLoop, columns
from inlay.train.arguments import shared
from inlay.train.collate import Collate
from inlay.train.head_run import HeadRun
from inlay.train.overview import Example
from inlay.train.task_run import Setup
from inlay.train.trainer import HeldOut


class RewardRun(HeadRun[RunConfig, RewardPair]):
    """A run that trains a model to give the better answer more."""

    @property
    def head(self) -> Head:
        return Head("sequence", seed=self.config.seed)

    def recall(self, model: PreTrainedModel, rows: Rows, record: Mapping[str, Any]) -> None:
        super().recall(model, rows, record)
        head = head_of(model)
        if head is None or head.purpose != "sequence" or len(head.labels) != 1:
            raise ModelError(
                f"the {type(model).__name__} gives no reward, which is one number a row; choose an "
                "adapter that was trained with --task reward"
            )

    def encode(self, rows: Rows) -> list[RewardPair]:
        return encode_reward_pairs(rows, self.tokenizer, self.longest)

    def check(self, rows: Rows, encoded: list[RewardPair]) -> None:
        self.note_shorter_model("rows")
        for side in SIDES:
            pairs = zip(encoded, rows.lines, strict=True)
            cut = [line for pair, line in pairs if getattr(pair, side).truncated]
            self.note_lines(cut, f"whose {side} answer is cut at {self.longest} tokens")
        self.note_lines(rows.skipped, "left out: a field is empty")

    def texts(self, row: RewardPair) -> Sequence[InputRow]:
        return [row.chosen, row.rejected]

    def examples(self, rows: Rows, index: int, row: RewardPair) -> list[Example]:
        return [self.example(rows.where(index), getattr(row, side), side) for side in SIDES]

    # A step

    def columns(self, rows: Sequence[RewardPair]) -> dict[str, list[Any]]:
        return columns(rows)

    def collator(self, rows: Sequence[RewardPair], multiple: int) -> Collate:
        del rows
        return PadPairs(self.padding, multiple)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return a batch's loss, as TRL's RewardTrainer computes it."""
        chosen, rejected = model(**accepted(model, batch)).logits.squeeze(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    def full_row(self) -> RewardPair:
        return RewardPair(self.full_text(), self.full_text())

    # Training

    def trainer(self, setup: Setup[RewardPair]) -> RewardLoop:
        """Return the trainer; dropout is off, as in TRL."""
        model, rows = setup.model, setup.tokens.train
        return RewardLoop(
            model,
            setup.tokenizer,
            self.columns(rows),
            RewardConfig(
                **shared(RewardConfig, self.config, model, setup.checkpoints, setup.learning_rate),
                disable_dropout=True,
                max_length=None,
                pad_to_multiple_of=length_multiple(model),
            ),
            held_out=self.held_out(model, setup.tokens.validation),
            **setup.watched,
        )

    def held_out(self, model: PreTrainedModel, pairs: list[RewardPair]) -> HeldOut | None:
        if not pairs:
            return None
        size = max(self.config.batch_size, 8)
        return lambda: held_out_rewards(model, pairs, size)

    # Measuring

    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[RewardPair], limits: Limits
    ) -> ComparisonRecord:
        return compare_rewards(model, encoded, lines=rows.lines, **pace(limits))

    def merge_inputs(self, model: PreTrainedModel, rows: Rows) -> list[dict[str, Tensor]]:
        batches = [padded_inputs([pair.chosen], 0, 1) for pair in self.encode(rows)]
        return [accepted(model, batch) for batch in batches]
