"""A run on rewards: the model answers prompts and learns from what is worth most, by TRL's GRPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig

from inlay.data.rows import Rows
from inlay.data.tokens import Encoded
from inlay.errors import DataError, UsageError
from inlay.evaluate.comparison import Limits, pace
from inlay.evaluate.generation import context_length
from inlay.evaluate.record import ComparisonRecord
from inlay.memory.devices import Device
from inlay.memory.generating import Answering
from inlay.model.load.folder import located
from inlay.model.merge.merge import check_mergeable
from inlay.tasks.grpo import GrpoConfig
from inlay.tasks.grpo.compare import Prompts as JudgedPrompts
from inlay.tasks.grpo.compare import answers_of, compare_rewards
from inlay.tasks.grpo.guard import RewardGuard
from inlay.tasks.grpo.judge import Judge, judge_of
from inlay.tasks.grpo.judged_prompts import judging
from inlay.tasks.grpo.rows import encode_prompts
from inlay.tasks.grpo.trainer import RewardTrainer
from inlay.train.arguments import shared
from inlay.train.collate import Collate, Padded, labels
from inlay.train.language_run import LanguageRun, Prompts
from inlay.train.overview import TextRows
from inlay.train.planning import PlannedRows, padding_multiple
from inlay.train.rows import RunRows
from inlay.train.task_run import Setup, Tokens
from inlay.train.trainer import HeldOut


class GrpoRun(LanguageRun[GrpoConfig, Encoded]):
    """A run that trains a model on its own answers, by what they are worth."""

    @cached_property
    def judge(self) -> Judge:
        return judge_of(self.config.rewards or [])

    def encode(self, rows: Rows) -> list[Encoded]:
        return encode_prompts(rows, self.tokenizer, self.config.max_length)

    def encode_answers(self, rows: Rows) -> list[Encoded]:
        return self.encode(rows)

    def check(self, rows: Rows, encoded: list[Encoded]) -> None:
        check_generation(self.config.generation)
        config = self.asked
        prompts = config.batch_size * config.gradient_accumulation // config.num_generations
        if len(encoded) < prompts:
            raise DataError(
                f"{rows.source}: {len(encoded)} prompts to train on, and a step takes {prompts} "
                f"(batch_size {config.batch_size} x gradient_accumulation "
                f"{config.gradient_accumulation} / num_generations {config.num_generations}); give "
                "more rows, or make the step smaller"
            )
        self.note_lines(rows.skipped, "left out: a field is empty")
        if over := len(encoded) % prompts:
            self.note(
                f"{over} of {len(encoded)} prompts are left out of every epoch, others each time: "
                f"a step takes {prompts}"
            )

    def texts(self, row: Encoded) -> Sequence[Encoded]:
        return [row]

    def overview(self, rows: RunRows, show: int) -> TextRows:
        also = [
            f"the reward {reward.name}: weight {reward.weight:g}"
            + (f", reads {' and '.join(map(repr, reward.columns))}" if reward.columns else "")
            for reward in self.judge.rewards
        ]
        return replace(super().overview(rows, show), cut=False, also=also)

    def columns_shown(self, row: Mapping[str, object]) -> dict[str, object]:
        return {name: value for name, value in row.items() if name != "prompt"}

    # A step

    def columns(self, rows: Sequence[Encoded]) -> dict[str, list[Any]]:
        return {
            "input_ids": [row.input_ids for row in rows],
            "labels": [labels(row) for row in rows],
        }

    def collator(self, rows: Sequence[Encoded], multiple: int) -> Collate:
        del rows
        return Padded(multiple)

    def full_row(self) -> Encoded:
        length = self.config.max_length + self.config.max_completion_tokens
        return Encoded([0] * length, [True] * length, length)

    def to_plan(self, rows: Sequence[Encoded], device: Device) -> PlannedRows:
        """Return a batch of the longest answers to the longest prompt."""
        if not rows:
            return self.answering(super().to_plan(rows, device))
        config, answer = self.config, self.config.max_completion_tokens
        longest, group = max(self.lengths(rows)), config.num_generations
        length = longest + answer
        row = Encoded([0] * length, [False] * longest + [True] * answer, length)
        numbers, multiple = range(config.batch_size), padding_multiple(config, device)
        planned = PlannedRows(
            config,
            self.batch_of([row] * config.batch_size, numbers, multiple),
            self.loss,
            count=len(rows) * group,
            tokens=sum(len(each.input_ids) + answer for each in rows) * group,
            trained_tokens=len(rows) * group * answer,
        )
        return self.answering(planned)

    def answering(self, planned: PlannedRows) -> PlannedRows:
        """Return rows whose step generates its answers first, if this process does that."""
        config = self.config
        planned = replace(planned, whole_steps=True)
        if config.generation == "vllm":
            return planned
        answers = config.batch_size * config.gradient_accumulation
        prompt = max(1, planned.batch["input_ids"].shape[1] - config.max_completion_tokens)
        sorts = config.top_p != 1.0
        answering = Answering(answers, prompt, config.max_completion_tokens, sorts=sorts)
        return replace(planned, answering=answering)

    # Training

    def inputs(self) -> dict[str, str]:
        return {"rewards_sha256": self.judge.sha256} if self.judge.sha256 else {}

    def prepare(
        self, model: PreTrainedModel, tokens: Tokens[Encoded], record: dict[str, Any]
    ) -> None:
        """Raise unless the longest prompt and answer fit the model's context."""
        del record
        if self.config.generation == "vllm":
            check_mergeable(model)
            model.name_or_path = str(located(self.config.model, self.config.revision))
        room, answer = context_length(model), self.config.max_completion_tokens
        parts = (tokens.train, tokens.validation, tokens.test)
        most = max(len(row.input_ids) for part in parts for row in part)
        if room is not None and most + answer > room:
            raise UsageError(
                f"the longest prompt has {most} tokens and an answer may have {answer} "
                f"(max_completion_tokens), together more than the model's context of {room}; "
                "lower max_completion_tokens, or shorten the prompts"
            )

    def trainer(self, setup: Setup[Encoded]) -> RewardTrainer:
        """Return the trainer; the reference is Inlay's own, so TRL has no beta."""
        model, config = setup.model, self.config
        return RewardTrainer(
            model,
            setup.tokenizer,
            setup.tokens.train_rows,
            setup.tokens.train,
            self.judge,
            GRPOConfig(
                **shared(GRPOConfig, config, model, setup.checkpoints, setup.learning_rate),
                beta=0.0,
                loss_type="dapo",
                scale_rewards="group",
                num_iterations=1,
                num_generations=config.num_generations,
                max_completion_length=config.max_completion_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=0,
                reward_weights=[reward.weight for reward in self.judge.rewards],
                disable_dropout=True,
                shuffle_dataset=False,
                remove_unused_columns=False,
                pad_to_multiple_of=None,
                use_vllm=config.generation == "vllm",
                vllm_mode="colocate",
            ),
            beta=config.beta,
            held_out=self.held_out(model, setup.tokens),
            **{**setup.watched, "guard": RewardGuard()},
        )

    def held_out(self, model: PreTrainedModel, tokens: Tokens[Encoded]) -> HeldOut | None:
        if not tokens.validation:
            return None
        prompts = self.judged(tokens.validation_rows, tokens.validation)

        def measure() -> Mapping[str, float]:
            found = answers_of(model, self.tokenizer, prompts, self.at_once)
            worth = prompts.judge(found)["reward"]
            lengths = [len(each.tokens) for each in found]
            return {
                "reward": sum(worth) / len(worth),
                "answer_tokens": sum(lengths) / len(lengths),
                "cut_off": sum(not each.ended for each in found) / len(found),
            }

        return measure

    @property
    def at_once(self) -> int:
        """Answers that are generated together: as many as in a step."""
        return self.config.batch_size * self.config.gradient_accumulation

    # Measuring

    def answer_at_most(self, tokens: int) -> None:
        self.config = self.config.model_copy(update={"max_completion_tokens": tokens})

    def limits(self) -> Limits:
        return {"batch_size": self.at_once}

    def prompts(self, rows: Rows) -> Prompts:
        tokens = [row.input_ids for row in self.encode(rows)]
        shown = [
            {"line": str(line), "prompt": self.text(ids)}
            for line, ids in zip(rows.lines, tokens, strict=True)
        ]
        return Prompts(tokens, shown)

    def judged(self, rows: Rows, encoded: Sequence[Encoded]) -> JudgedPrompts:
        return judging(self.config, self.judge, rows, encoded, "on held-out prompts")

    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[Encoded], limits: Limits
    ) -> ComparisonRecord:
        judged = self.judged(rows, encoded)
        return compare_rewards(model, self.tokenizer, judged, **pace(limits))


def check_generation(name: str) -> None:
    """Raise unless this can write answers here."""
    if name == "vllm" and find_spec("vllm") is None:
        raise UsageError(
            "generation 'vllm' needs vLLM, which is not installed; run pip install vllm on a "
            "machine with a GPU, or leave generation at transformers"
        )
