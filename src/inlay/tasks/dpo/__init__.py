"""The preferred answer rather than the rejected one, by TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inlay.data.fields import there
from inlay.data.preference import are_pairs, normalise_pairs
from inlay.data.raw import RawRow
from inlay.data.rows import Rows
from inlay.evaluate.titles import ANSWERS
from inlay.run.config import NotNegative, RunWithImages, beta
from inlay.train.task import PREFERENCE, Task, positive

if TYPE_CHECKING:
    from inlay.tasks.dpo.run import DpoRun


class PreferenceConfig(RunWithImages):
    """A run on preferences."""

    beta: NotNegative = beta(0.1)


class Dpo(Task):
    name = "dpo"
    about = "the preferred answer rather than the rejected one, by TRL's DPOTrainer"
    options = PreferenceConfig
    fixed = PREFERENCE
    titles = ANSWERS.with_own(
        {
            "loss": "loss per pair",
            "accuracy": "preferred answer more likely",
            "margin": "margin, nats",
            "chosen_loss": "loss of preferred answers, nats per token",
            "chosen_perplexity": "perplexity of preferred answers",
            "reward_accuracy": "reward accuracy",
        },
        curves={"reward_accuracy": "reward accuracy"},
    )
    learning_rate_factor = 0.1
    rows_in_words = {"preference": "preferences"}

    def problems(self, config: PreferenceConfig) -> dict[str, str]:
        return positive("beta", config.beta)

    def read(self, raw: Sequence[RawRow], config: PreferenceConfig, group: str | None) -> Rows:
        return normalise_pairs(
            raw,
            group=group or there(raw, config.split_by),
            skip_empty=config.skip_empty,
            allow_urls=bool(config.allow_urls),
        )

    def fits(self, row: RawRow, keys: Mapping[str, Any]) -> bool:
        return are_pairs(row)

    def run(self, config: PreferenceConfig) -> DpoRun:
        from inlay.tasks.dpo.run import DpoRun

        return DpoRun(self, config)
