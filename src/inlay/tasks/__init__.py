"""The tasks there are, one folder each, and what is wrong with a run's keys under one of them.

Nothing here imports torch: a task's own modules are imported when a run of it begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from inlay.data.raw import RawRow
from inlay.errors import UsageError, did_you_mean
from inlay.run.config import RunConfig
from inlay.tasks.classify import Classify
from inlay.tasks.dpo import Dpo
from inlay.tasks.embed import Embed
from inlay.tasks.grpo import Grpo
from inlay.tasks.kto import Kto
from inlay.tasks.orpo import Orpo
from inlay.tasks.reward import Reward
from inlay.tasks.sft import Sft
from inlay.train.task import TASKS, Task, register

__all__ = ["TASKS", "Task", "check_keys", "check_task", "register", "task_of_rows"]

for each in (Sft(), Dpo(), Grpo(), Kto(), Orpo(), Classify(), Reward(), Embed()):
    register(each)
for folder in iter_modules(__path__):  # one that was added registers its own task
    if folder.ispkg and folder.name not in TASKS:
        import_module(f"{__name__}.{folder.name}")


def no_such_task(name: str) -> str:
    return f"there is no task {name!r}; there are {', '.join(TASKS)}.{did_you_mean(name, TASKS)}"


def check_task(config: RunConfig) -> dict[str, str]:
    """Return a sentence for every key of a run whose value is wrong under its task."""
    task = TASKS[config.task]
    problems = task.problems(config)
    for key, fixed in task.fixed.items():
        if getattr(config, key) not in (fixed.value, "auto"):
            problems[key] = (
                f"{key!r} does not apply to the task {task.name!r} ({fixed.reason}); take it out"
            )
    if config.batch_size < task.least_batch:
        problems["batch_size"] = (
            f"'batch_size' must be at least {task.least_batch} for the task {task.name!r}: "
            f"{task.why_least}"
        )
    return problems


def check_keys(name: str, given: Mapping[str, Any]) -> None:
    """Raise when a key that was given belongs to other tasks than this one."""
    for key in given:
        others = tasks_with(key)
        if others and name not in others:
            raise UsageError(owners(key, name))


def owners(key: str, name: str) -> str:
    *others, last = tasks_with(key)
    named = f"tasks {', '.join(others)} and {last}" if others else f"task {last}"
    return f"{key!r} belongs to the {named}, not to {name!r}"


def tasks_with(key: str) -> list[str]:
    return [name for name, task in TASKS.items() if key in task.own]


def task_of_rows(row: RawRow, own: Task, keys: Mapping[str, Any]) -> Task:
    """Return the task whose measures rows are for: the adapter's own if they fit it.

    Pairs are measured as preferences, all other rows as answers, whatever was trained for.
    """
    if own.fits(row, keys):
        return own
    return next(task for task in (TASKS["dpo"], TASKS["sft"]) if task.fits(row, keys))
