"""What a run can train for: its rows, the keys it knows, and where its loop stands.

A new task is an entry here and a file with its loop. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inlay.errors import UsageError, did_you_mean

__all__ = ["TASKS", "Task", "check_keys", "task_problems"]


@dataclass(frozen=True)
class Fixed:
    """The only value that a key may have under a task, beside `auto`, and why."""

    value: object
    reason: str


@dataclass(frozen=True)
class Task:
    """One thing to train for."""

    name: str
    about: str
    rows: Literal["supervised", "preference", "labelled", "prompt", "labels", "similar"]
    loop: str
    """The module of the run's stages, which has a class `Stages`."""
    images: str = ""
    """The module of the stages for rows with images, if the task takes such."""
    own: Mapping[str, object] = field(default_factory=dict[str, object])
    """The keys that this task has and others may not, with their defaults."""
    fixed: Mapping[str, Fixed] = field(default_factory=dict[str, Fixed])
    """The keys that this task does not know."""
    learning_rate_factor: float = 1.0
    """How the best learning rate stands to the one for supervised rows."""
    prompts_count: bool = False
    """Whether the loss counts the tokens of the preferred answer's prompt, too."""
    kept_batches: bool = False
    """Whether the rows that go through the model together are the same in every epoch."""
    least_batch: int = 1
    """The fewest rows that may go through the model together."""
    why_least: str = ""
    verbs: str = ""
    """The module that measures, shows and plans rows that no language model reads, if so."""
    check: Callable[[Mapping[str, Any]], dict[str, str]] = lambda values: {}
    """Returns a sentence for every value that is wrong under this task alone."""

    def settled(self, values: Mapping[str, Any]) -> dict[str, object]:
        """Return the values that the task gives to keys the user left open."""
        defaults = {key: value for key, value in self.own.items() if values[key] is None}
        return defaults | {key: fixed.value for key, fixed in self.fixed.items()}


def not_supervised(fields: str, padded: str) -> dict[str, Fixed]:
    """Return the keys that only supervised rows know, for rows of these fields."""
    columns = f"its rows have the fields {fields}"
    return {
        **{key: Fixed(None, columns) for key in ("prompt", "completion", "text")},
        "format": Fixed("auto", columns),
        "packing": Fixed(False, padded),
        "cache_trunk": Fixed(False, "every row goes through the whole model"),
        "eight_bits": Fixed(False, "its gate measures the loss of supervised rows"),
    }


IMAGES: dict[str, object] = {"max_pixels": None, "allow_urls": False, "cache_vision": "auto"}
"""The keys that rows with images alone know, and their defaults."""
PREFERENCE = not_supervised(
    "prompt, chosen and rejected", "the two answers to a prompt are padded side by side"
)
LABELLED = not_supervised(
    "prompt, completion and label", "a batch's answers are padded, and scored with two prompts each"
)
MISMATCHED = "how far the model has gone is estimated from each prompt with another row's answer"

NEW_HEAD = {"head_storage": Fixed("dense", "its own head takes that one's place")}
NAMED = "anchor, positive, negative and score name its columns"
HEADED: dict[str, Fixed] = {
    "format": Fixed("auto", "its rows are read by the columns' names"),
    "prompt": Fixed(None, "text names the input, and may be a template"),
    "completion": Fixed(None, "label names what is predicted"),
    "packing": Fixed(False, "rows are padded side by side"),
    "cache_trunk": Fixed(False, "every row goes through the whole model"),
    "eight_bits": Fixed(False, "its gate measures the loss of supervised rows"),
    **NEW_HEAD,
}
"""What no task on a model with a head knows."""

ANSWERED = "every held-out prompt is answered, up to eval_rows and max_completion_tokens"
PROMPTS: dict[str, Fixed] = {
    "format": Fixed("auto", "its rows have a prompt, and columns that rewards read"),
    "completion": Fixed(None, "the model writes the answers"),
    "text": Fixed(None, "the model writes the answers"),
    "packing": Fixed(False, "the answers to a prompt are padded side by side"),
    "cache_trunk": Fixed(False, "no answer comes twice"),
    "eight_bits": Fixed(False, "its gate measures the loss of supervised rows"),
    "generate_rows": Fixed(32, ANSWERED),
    "generate_tokens": Fixed(128, ANSWERED),
}
"""What no task on prompts alone knows."""


def positive_beta(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a sentence where a loss that beta scales would be nothing."""
    zero = values["beta"] == 0
    return {"beta": "'beta' must be a number above 0 or nothing, not 0"} if zero else {}


def reward_arithmetic(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what is wrong with the rewards, and with how many answers make a step."""
    from inlay.train.judge import reward_problems

    problems: dict[str, str] = {}
    if values["rewards"] is None:
        problems["rewards"] = (
            "the task 'grpo' needs 'rewards', which say what an answer is worth: final_number, "
            "json, regex, length, or a function of a file, as rewards.py:function"
        )
    elif found := reward_problems(values["rewards"]):
        problems["rewards"] = found
    group = values["num_generations"] or TASKS["grpo"].own["num_generations"]
    answers = values["batch_size"] * values["gradient_accumulation"]
    if answers % group:
        problems["num_generations"] = (
            f"batch_size {values['batch_size']} x gradient_accumulation "
            f"{values['gradient_accumulation']} = {answers} answers a step, which is no multiple "
            f"of num_generations {group}, the answers to one prompt; change one of the three"
        )
    return problems


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "sft",
            "answers as the rows give them",
            "supervised",
            "inlay.train.supervised",
            images="inlay.train.vision",
            own=IMAGES,
        ),
        Task(
            "dpo",
            "the preferred answer rather than the rejected one, by TRL's DPOTrainer",
            "preference",
            "inlay.train.dpo",
            images="inlay.train.vision_pairs",
            own={"beta": 0.1, **IMAGES},
            fixed=PREFERENCE,
            learning_rate_factor=0.1,
            check=positive_beta,
        ),
        Task(
            "grpo",
            "answers that the rewards are high for, by TRL's GRPOTrainer",
            "prompt",
            "inlay.train.grpo",
            own={
                "beta": 0.0,
                "rewards": None,
                "num_generations": 8,
                "max_completion_tokens": 256,
                "temperature": 1.0,
                "top_p": 1.0,
                "generation": "transformers",
            },
            fixed=PROMPTS,
            learning_rate_factor=0.1,
            check=reward_arithmetic,
        ),
        Task(
            "kto",
            "desirable answers rather than undesirable ones, by TRL's KTOTrainer",
            "labelled",
            "inlay.train.kto",
            images="inlay.train.vision_labelled",
            own={"beta": 0.1, "desirable_weight": "auto", "undesirable_weight": "auto", **IMAGES},
            fixed=LABELLED,
            learning_rate_factor=0.1,
            kept_batches=True,
            check=positive_beta,
            least_batch=2,
            why_least=MISMATCHED,
        ),
        Task(
            "orpo",
            "the preferred answer as it stands, and rather than the rejected one, by TRL's "
            "ORPOTrainer",
            "preference",
            "inlay.train.orpo",
            images="inlay.train.vision_odds",
            own={"beta": 0.1, **IMAGES},
            fixed=PREFERENCE,
            learning_rate_factor=0.5,
            check=positive_beta,
            prompts_count=True,
        ),
        Task(
            "classify",
            "a class, several, a number, or a tag for each word, by a new head",
            "labels",
            "inlay.train.classify",
            own={"kind": "auto", "label": None, "text_pair": None},
            fixed=HEADED,
            verbs="inlay.train.labels",
        ),
        Task(
            "reward",
            "a number for an answer, more for the preferred one, by TRL's RewardTrainer",
            "preference",
            "inlay.train.reward",
            fixed=PREFERENCE | NEW_HEAD,
            learning_rate_factor=0.1,
            verbs="inlay.train.reward_pairs",
        ),
        Task(
            "embed",
            "texts that belong together near each other, by sentence-transformers' losses",
            "similar",
            "inlay.train.embed",
            own={**dict.fromkeys(("anchor", "positive", "negative", "score")), "pooling": "auto"},
            fixed=HEADED | dict.fromkeys(("prompt", "completion", "text"), Fixed(None, NAMED)),
            learning_rate_factor=0.5,
            verbs="inlay.train.similar",
        ),
    )
}


def task_problems(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a sentence for a task there is not, and for every key that the task does not know."""
    name: str = values["task"]
    if name not in TASKS:
        known = ", ".join(TASKS)
        return {"task": f"there is no task {name!r}; there are {known}.{did_you_mean(name, TASKS)}"}
    task = TASKS[name]
    problems = task.check(values)
    problems |= {
        key: f"{key!r} belongs to the task {' and '.join(owners(key))}, not to {name!r}"
        for key in sorted({key for other in TASKS.values() for key in other.own})
        if key not in task.own and values[key] is not None
    }
    for key, fixed in task.fixed.items():
        if values[key] != fixed.value and values[key] != "auto":
            problems[key] = (
                f"{key!r} does not apply to the task {name!r} ({fixed.reason}); take it out"
            )
    if values["batch_size"] < task.least_batch:
        problems["batch_size"] = (
            f"'batch_size' must be at least {task.least_batch} for the task {name!r}: "
            f"{task.why_least}"
        )
    return problems


def check_keys(name: str, given: Mapping[str, Any]) -> None:
    """Raise when a key that was given belongs to other tasks than this one.

    Raises:
        UsageError: naming the key and its tasks.
    """
    for key in given:
        others = owners(key)
        if others and name not in others:
            raise UsageError(f"{key!r} belongs to the task {' and '.join(others)}, not to {name!r}")


def seeing_tasks() -> list[str]:
    """Return the tasks that take rows with images."""
    return [name for name, task in TASKS.items() if task.images]


def owners(key: str) -> list[str]:
    """Return the tasks that have a key."""
    return [name for name, task in TASKS.items() if key in task.own]
