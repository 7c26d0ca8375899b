"""A run on rewards: the model answers prompts and learns from what is worth most, by TRL's GRPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig

from inlay.data.prompts import encode_prompts
from inlay.data.rows import Rows
from inlay.data.tokens import Encoded
from inlay.errors import DataError, UsageError
from inlay.evaluate.generation import context_length
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.reward import Prompts, answers_of, compare_rewards
from inlay.memory.devices import Device
from inlay.model.load.folder import located
from inlay.model.merge.merge import check_mergeable
from inlay.train import planning
from inlay.train.arguments import shared
from inlay.train.judge import Judge, judge_of
from inlay.train.judging import judging
from inlay.train.reward_trainer import RewardGuard, RewardTrainer
from inlay.train.running import Running, Tokens
from inlay.train.trainer import HeldOut


class Stages(Running[Encoded]):
    """A run that trains a model on its own answers, by what they are worth."""

    @cached_property
    def judge(self) -> Judge:
        """The run's rewards."""
        return judge_of(self.config.rewards or [])

    @property
    def longest(self) -> int:
        """How many tokens an answer may have."""
        assert self.config.max_completion_tokens is not None
        return self.config.max_completion_tokens

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        """Return prompts as tokens."""
        return encode_prompts(rows, tokenizer, self.config.max_length)

    def check_rows(self, rows: Rows, encoded: list[Encoded]) -> None:
        """Raise when the prompts are too few for a step; tell of those that are left out."""
        check_generation(self.config.generation)
        config = self.asked
        assert config.num_generations is not None
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

    def inputs(self) -> dict[str, str]:
        """Return the hash of the user's reward functions."""
        return {"rewards_sha256": self.judge.sha256} if self.judge.sha256 else {}

    def largest(self, encoded: list[Encoded], device: Device) -> planning.Rows:
        """Return the largest batch: the longest prompts with the longest answers."""
        multiple = planning.padding_multiple(self.config, device)
        return planning.prompts_to_plan(self.config, encoded, multiple)

    def prepare(
        self, model: PreTrainedModel, tokens: Tokens[Encoded], record: dict[str, Any]
    ) -> None:
        """Raise unless the longest prompt and answer fit the model's context.

        Raises:
            UsageError: they do not.
            MergeError: vLLM is asked for, and the adapter cannot be merged into what it runs.
        """
        del record
        if self.config.generation == "vllm":
            check_mergeable(model)
            model.name_or_path = str(located(self.config.model, self.config.revision))
        room = context_length(model)
        parts = (tokens.train, tokens.validation, tokens.test)
        most = max(len(row.input_ids) for part in parts for row in part)
        if room is not None and most + self.longest > room:
            raise UsageError(
                f"the longest prompt has {most} tokens and an answer may have {self.longest} "
                f"(max_completion_tokens), together more than the model's context of {room}; "
                "lower max_completion_tokens, or shorten the prompts"
            )

    def watched(self) -> dict[str, Any]:
        """Return what the trainer is watched and kept by."""
        return super().watched() | {"guard": RewardGuard()}

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[Encoded],
        record: dict[str, Any],
    ) -> RewardTrainer:
        """Return the trainer, nothing trained yet."""
        assert self.config.beta is not None
        return RewardTrainer(
            model,
            tokenizer,
            tokens.train_rows,
            tokens.train,
            self.judge,
            self.arguments(model, record["learning_rate"]["value"]),
            beta=self.config.beta,
            held_out=self.held_out(model, tokenizer, tokens),
            **self.watched(),
        )

    def arguments(self, model: PreTrainedModel, learning_rate: float) -> GRPOConfig:
        """Return TRL's arguments; the reference is ours, so that TRL is told of no beta."""
        config = self.config
        assert config.temperature is not None
        assert config.top_p is not None
        return GRPOConfig(
            **shared(GRPOConfig, config, model, self.folder.checkpoints, learning_rate),
            beta=0.0,
            loss_type="dapo",
            scale_rewards="group",
            num_iterations=1,
            num_generations=config.num_generations,
            max_completion_length=self.longest,
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
        )

    def held_out(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[Encoded]
    ) -> HeldOut | None:
        """Return what measures the likeliest answers to held-out prompts, or None without any."""
        if not tokens.validation:
            return None
        prompts = self.prompts(tokens.validation_rows, tokens.validation, "on held-out prompts")

        def measure() -> Mapping[str, float]:
            found = answers_of(model, tokenizer, prompts, self.at_once)
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
        """How many answers are written together: as many as in a step."""
        return self.config.batch_size * self.config.gradient_accumulation

    def prompts(self, rows: Rows, encoded: Sequence[Encoded], when: str) -> Prompts:
        """Return held-out prompts, and how they are answered and judged."""
        return judging(self.config, self.judge, rows, encoded, when)

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[Encoded]
    ) -> ComparisonRecord:
        """Return base against tuned on the test rows."""
        prompts = self.prompts(tokens.test_rows, tokens.test, "on held-out prompts")
        return compare_rewards(model, tokenizer, prompts, batch_size=self.at_once)


def check_generation(name: str | None) -> None:
    """Raise unless this can write answers here.

    Raises:
        UsageError: vLLM is not installed.
    """
    if name == "vllm" and find_spec("vllm") is None:
        raise UsageError(
            "generation 'vllm' needs vLLM, which is not installed; run pip install vllm on a "
            "machine with a GPU, or leave generation at transformers"
        )
