"""Answers that the rewards are high for, by TRL's GRPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from inlay.data.raw import RawRow
from inlay.data.rows import Rows
from inlay.evaluate.titles import ANSWERS
from inlay.run.config import NotNegative, RunConfig, Text, beta
from inlay.tasks.grpo.judge import judge_of
from inlay.tasks.grpo.named_rewards import reward_problems
from inlay.tasks.grpo.rows import are_prompts, normalise_prompts
from inlay.train.task import PADDED, Fixed, Task

if TYPE_CHECKING:
    from inlay.tasks.grpo.run import GrpoRun

ANSWERED = "every held-out prompt is answered, up to eval_rows and max_completion_tokens"


class GrpoConfig(RunConfig):
    """A run on rewards."""

    beta: NotNegative = beta(0.0)
    rewards: Annotated[list[Text | dict[str, Any]], Field(min_length=1)] | None = Field(
        None,
        description="grpo: reward functions: final_number, json, regex, length or "
        "FILE.py:function, each a name or a mapping with name, weight and arguments",
    )
    num_generations: Annotated[int, Field(ge=2)] = Field(
        8, description="grpo: answers generated per prompt; default 8"
    )
    max_completion_tokens: PositiveInt = Field(
        256, description="grpo: maximum tokens per answer; default 256"
    )
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="grpo: sampling temperature; default 1"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="grpo: sample from the most likely tokens up to this probability; default 1 "
        "(all tokens)",
    )
    generation: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="grpo: library that generates the answers; default transformers, in this "
        "process",
    )


class Grpo(Task):
    name = "grpo"
    about = "answers that the rewards are high for, by TRL's GRPOTrainer"
    options = GrpoConfig
    fixed = {
        "format": Fixed("auto", "its rows have a prompt, and columns that rewards read"),
        "completion": Fixed(None, "the model writes the answers"),
        "text": Fixed(None, "the model writes the answers"),
        "packing": Fixed(False, "the answers to a prompt are padded side by side"),
        **PADDED,
        "cache_trunk": Fixed(False, "no answer comes twice"),
        "generate_rows": Fixed(32, ANSWERED),
        "generate_tokens": Fixed(128, ANSWERED),
    }
    titles = ANSWERS.with_own(
        {
            "loss": "loss",
            "reward": "reward of greedy answers",
            "sampled_reward": "reward of sampled answers",
            "kl": "KL to the base, nats per token",
            "answer_tokens": "tokens per answer",
            "cut_off": "answers cut off",
        },
        curves={"kl": "KL to the base, nats per token", "reward": "reward"},
    )
    learning_rate_factor = 0.1
    needs_answers = False
    rows_in_words = {"prompt": "prompts"}

    def problems(self, config: GrpoConfig) -> dict[str, str]:
        problems: dict[str, str] = {}
        if config.rewards is None:
            problems["rewards"] = (
                "the task 'grpo' needs 'rewards', which say what an answer is worth: "
                "final_number, json, regex, length, or a function of a file, as "
                "rewards.py:function"
            )
        elif found := reward_problems(config.rewards):
            problems["rewards"] = found
        answers = config.batch_size * config.gradient_accumulation
        if answers % config.num_generations:
            problems["num_generations"] = (
                f"batch_size {config.batch_size} x gradient_accumulation "
                f"{config.gradient_accumulation} = {answers} answers a step, which is no multiple "
                f"of num_generations {config.num_generations}, the answers to one prompt; change "
                "one of the three"
            )
        return problems

    def undividable(self, config: GrpoConfig, own_rows: int, step_rows: int) -> dict[str, str]:
        problems: dict[str, str] = {}
        group = config.num_generations
        if own_rows % group:
            problems["num_generations"] = (
                f"the {group} answers to a prompt are compared in one process, and each gives "
                f"{own_rows} of a step's {step_rows}; make that a multiple of {group}, by a larger "
                "gradient_accumulation or fewer processes"
            )
        if config.generation == "vllm":
            problems["generation"] = (
                "vLLM was not tried beside several of them; leave generation at transformers"
            )
        return problems

    def read(self, raw: Sequence[RawRow], config: GrpoConfig, group: str | None) -> Rows:
        return normalise_prompts(
            raw,
            prompt=config.prompt,
            needed=judge_of(config.rewards or []).needed,
            group=group,
            skip_empty=config.skip_empty,
        )

    def fits(self, row: RawRow, keys: Mapping[str, Any]) -> bool:
        return are_prompts(row, keys.get("prompt"), judge_of(keys["rewards"]).needed)

    def run(self, config: GrpoConfig) -> GrpoRun:
        from inlay.tasks.grpo.run import GrpoRun

        return GrpoRun(self, config)
