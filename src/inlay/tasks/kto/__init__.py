"""Desirable answers rather than undesirable ones, by TRL's KTOTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from inlay.data.fields import there
from inlay.data.raw import RawRow
from inlay.data.rows import Rows
from inlay.evaluate.titles import ANSWERS
from inlay.run.config import NotNegative, Positive, RunWithImages, beta
from inlay.tasks.kto.rows import are_labelled, normalise_labelled
from inlay.train.task import Task, not_supervised, positive

if TYPE_CHECKING:
    from inlay.tasks.kto.run import KtoRun


class KtoConfig(RunWithImages):
    """A run on labelled rows."""

    beta: NotNegative = beta(0.1)
    desirable_weight: Literal["auto"] | Positive = Field(
        "auto",
        description="kto: weight of desirable rows in the loss; default auto: both labels weigh "
        "about the same",
    )
    undesirable_weight: Literal["auto"] | Positive = Field(
        "auto", description="kto: weight of undesirable rows in the loss; default auto"
    )


class Kto(Task):
    name = "kto"
    about = "desirable answers rather than undesirable ones, by TRL's KTOTrainer"
    options = KtoConfig
    fixed = not_supervised(
        "prompt, completion and label",
        "a batch's answers are padded, and scored with two prompts each",
    )
    titles = ANSWERS.with_own(
        {
            "loss": "loss per row",
            "auc": "desirable answer more likely (AUC)",
            "reward_margin": "reward margin",
            "desirable_reward": "reward of desirable answers",
            "undesirable_reward": "reward of undesirable answers",
            "reward_desirable": "reward of desirable answers",
            "reward_undesirable": "reward of undesirable answers",
            "desirable_loss": "loss of desirable answers, nats per token",
            "desirable_perplexity": "perplexity of desirable answers",
            "kl": "KL to the base, nats per token",
        },
        curves={
            "reward_desirable": "reward of desirable answers",
            "reward_undesirable": "reward of undesirable answers",
            "kl": "KL to the base, nats per token",
        },
    )
    learning_rate_factor = 0.1
    least_batch = 2
    why_least = "how far the model has gone is estimated from each prompt with another row's answer"
    answers_all_rows = False
    rows_in_words = {"labelled": "labelled answers"}

    def problems(self, config: KtoConfig) -> dict[str, str]:
        return positive("beta", config.beta)

    def read(self, raw: Sequence[RawRow], config: KtoConfig, group: str | None) -> Rows:
        return normalise_labelled(
            raw,
            group=group or there(raw, config.split_by),
            skip_empty=config.skip_empty,
            allow_urls=bool(config.allow_urls),
        )

    def fits(self, row: RawRow, keys: Mapping[str, Any]) -> bool:
        return are_labelled(row)

    def run(self, config: KtoConfig) -> KtoRun:
        from inlay.tasks.kto.run import KtoRun

        return KtoRun(self, config)
