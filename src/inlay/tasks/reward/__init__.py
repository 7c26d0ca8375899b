"""A number for an answer, more for the preferred one, by TRL's RewardTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inlay.data.fields import there
from inlay.data.preference import normalise_pairs
from inlay.data.raw import RawRow
from inlay.data.rows import Rows
from inlay.evaluate.titles import Titles
from inlay.run.config import RunConfig
from inlay.train.task import NEW_HEAD, PREFERENCE, Task

if TYPE_CHECKING:
    from inlay.tasks.reward.run import RewardRun


class Reward(Task):
    name = "reward"
    about = "a number for an answer, more for the preferred one, by TRL's RewardTrainer"
    fixed = PREFERENCE | NEW_HEAD
    titles = Titles(
        {
            "reward_accuracy": "reward accuracy",
        },
        curves={"reward_accuracy": "reward accuracy"},
    )
    learning_rate_factor = 0.1
    has_head = True

    def read(self, raw: Sequence[RawRow], config: RunConfig, group: str | None) -> Rows:
        known = group or there(raw, config.split_by)
        return normalise_pairs(raw, group=known, skip_empty=config.skip_empty)

    def trained(self, head: Mapping[str, Any]) -> bool:
        return head.get("purpose") == "sequence" and head.get("problem") is None

    def run(self, config: RunConfig) -> RewardRun:
        from inlay.tasks.reward.run import RewardRun

        return RewardRun(self, config)
