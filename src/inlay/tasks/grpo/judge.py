"""The rewards of a run called on answers, and what they return checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from inlay.errors import TrainingError
from inlay.files import sha256_of
from inlay.tasks.grpo.named_rewards import (
    Reward,
    built_in,
    hash_of,
    module_of,
    own,
    reward_of,
    spec_of,
)
from inlay.tasks.grpo.rewards import Function

ROWS_NAMED = 3


@dataclass(frozen=True)
class Answers:
    """Answers to be judged, one for one with the rows they answer."""

    rows: Sequence[Mapping[str, Any]]
    """Each answer's row, its prompt and every column."""
    where: Sequence[str]
    """Where each row stands: `data.jsonl, line 3`."""
    completions: Sequence[Any]
    """Texts; to prompts of messages, lists of one message."""
    ids: Sequence[Sequence[int]]
    """The answers' tokens."""

    def by_name(self) -> dict[str, list[Any]]:
        """Return the keyword arguments of a reward."""
        names = dict.fromkeys(name for row in self.rows for name in row if name != "prompt")
        columns = {name: [row.get(name) for row in self.rows] for name in names}
        given = {"completions": [*self.completions], "completion_ids": [list(i) for i in self.ids]}
        return columns | {"prompts": [row["prompt"] for row in self.rows]} | given

    def one(self, index: int) -> Answers:
        part = slice(index, index + 1)
        return Answers(self.rows[part], self.where[part], self.completions[part], self.ids[part])


@dataclass(frozen=True)
class Judge:
    """The rewards of a run."""

    rewards: tuple[Reward, ...]
    files: tuple[Path, ...]

    @property
    def needed(self) -> dict[str, str]:
        """The columns that every row must fill, and the reward that reads each."""
        return {column: r.name for r in reversed(self.rewards) for column in r.columns}

    @property
    def sha256(self) -> str | None:
        """The hash of the user's files; None if there are none."""
        return sha256_of(*self.files) if self.files else None

    def scores(
        self, answers: Answers, when: str, also: Mapping[str, Any] | None = None
    ) -> list[list[float]]:
        """Return what each reward gives each answer; NaN where a reward does not judge it.

        Args:
            answers: what is judged.
            when: `at step 3`, for errors.
            also: what else a reward may ask for.
        """
        found = [scores_of(reward, answers, when, also or {}) for reward in self.rewards]
        for index, each in enumerate(zip(*found, strict=True)):
            if all(math.isnan(value) for value in each):
                raise TrainingError(
                    f"no reward judges the answer to {answers.where[index]} {when}: all of "
                    f"{', '.join(repr(r.name) for r in self.rewards)} return None; at least one "
                    "must return a number"
                )
        return found

    def totals(self, scores: Sequence[Sequence[float]]) -> list[float]:
        """Return each answer's reward: the weighted sum of those that judge it."""
        weighted = [
            [r.weight * value for value in values]
            for r, values in zip(self.rewards, scores, strict=True)
        ]
        return [sum(v for v in each if not math.isnan(v)) for each in zip(*weighted, strict=True)]

    # Calling a reward

    def apart(self) -> dict[str, str]:
        names = [reward.shown for reward in self.rewards]
        return {f"rewards/{n}/mean": f"reward_{n}" for n in names} if len(names) > 1 else {}

    def as_functions(self) -> list[Function]:
        """Return a function of each reward's name for TRL, which asks for some and calls none."""
        return [named_function(reward.shown) for reward in self.rewards]


def named_function(name: str) -> Any:

    def judged(**columns: Any) -> list[float]:
        raise AssertionError(f"{name} is called by the judge, not with {sorted(columns)}")

    judged.__name__ = name
    return judged


def scores_of(reward: Reward, answers: Answers, when: str, also: Mapping[str, Any]) -> list[float]:
    """Return what one reward gives each answer."""
    try:
        found = called(reward, answers, also)
    except Exception as error:
        raise TrainingError(
            f"the reward {reward.name!r} raised {type(error).__name__}: {error}, {when}, on the "
            f"answer to {culprit(reward, answers, also)}; mend the function"
        ) from error
    if isinstance(found, str | bytes) or not hasattr(found, "__len__"):
        raise TrainingError(
            f"the reward {reward.name!r} returned a {type(found).__name__} {when}, on the answers "
            f"to {named(answers.where)}; expected a list of {len(answers.rows)} numbers"
        )
    if len(found) != len(answers.rows):
        raise TrainingError(
            f"the reward {reward.name!r} returned {len(found)} values for {len(answers.rows)} "
            f"answers {when}, to {named(answers.where)}; expected one number an answer"
        )
    values = zip(found, answers.where, strict=True)
    return [number(reward, value, where, when) for value, where in values]


def called(reward: Reward, answers: Answers, also: Mapping[str, Any]) -> Any:
    names = {**also, **answers.by_name()}
    takes = reward.takes
    return reward.function(**{k: v for k, v in names.items() if takes is None or k in takes})


def culprit(reward: Reward, answers: Answers, also: Mapping[str, Any]) -> str:
    """Return the row whose answer a reward raises on, alone; else all rows."""
    for index, where in enumerate(answers.where):
        try:
            called(reward, answers.one(index), also)
        except Exception:
            return where
    return named(answers.where)


def number(reward: Reward, value: Any, where: str, when: str) -> float:
    """Return one value as a number; NaN for None, which judges nothing."""
    if value is None:
        return math.nan
    if callable(getattr(value, "item", None)):
        with suppress(ValueError, RuntimeError):  # of an array of several numbers, told below
            value = value.item()
    if not isinstance(value, Real) or not math.isfinite(value):
        kind = "" if isinstance(value, Real) else f", a {type(value).__name__}"
        raise TrainingError(
            f"the reward {reward.name!r} returned {value!r}{kind} for the answer to {where} "
            f"{when}; expected a finite number, or None where it does not judge an answer"
        )
    return float(value)


def named(places: Sequence[str]) -> str:
    once = list(dict.fromkeys(places))
    more = f" and {len(once) - ROWS_NAMED} more rows" if len(once) > ROWS_NAMED else ""
    return "; ".join(once[:ROWS_NAMED]) + more


# Finding the rewards that a run names


def judge_of(entries: Sequence[str | Mapping[str, Any]]) -> Judge:
    """Return the rewards that a run names; a user's file is run."""
    specs = [spec_of(entry) for entry in entries]
    files = dict.fromkeys(spec.file for spec in specs if spec.file is not None)
    modules = {path: module_of(path, hash_of(path)) for path in files}
    shown: list[str] = []
    rewards: list[Reward] = []
    for spec in specs:
        count = 1 + sum(name.partition(" ")[0] == spec.function for name in shown)
        shown.append(spec.function if count == 1 else f"{spec.function} {count}")
        function = built_in(spec) if spec.file is None else own(spec, modules[spec.file])
        rewards.append(reward_of(spec, shown[-1].replace(" ", "_"), function))
    return Judge(tuple(rewards), tuple(files))
