"""The rewards of a run: found by name, called, and what they return checked."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from numbers import Real
from pathlib import Path
from typing import Any, cast

import yaml

from inlay.errors import TrainingError, UsageError, did_you_mean
from inlay.files import sha256_of
from inlay.tasks.grpo.rewards import BUILT_IN, Function

__all__ = ["Answers", "Judge", "Reward", "judge_of", "reward_problems"]

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a reward may ask for beside the columns of the rows, as in TRL."""
ROWS_NAMED = 3


@dataclass(frozen=True)
class Spec:
    """One entry of `rewards`: a built-in reward or a function of a file, and its arguments."""

    name: str
    """As the user wrote it: `regex`, or `rewards.py:shortness`."""
    weight: float
    arguments: Mapping[str, Any]

    @property
    def file(self) -> Path | None:
        """The user's file; None for a built-in reward."""
        path, colon, _ = self.name.rpartition(":")
        return Path(path).expanduser() if colon else None

    @property
    def function(self) -> str:
        """The name of the function alone."""
        return self.name.rpartition(":")[2]


@dataclass(frozen=True)
class Reward:
    """A function that judges answers, and how much it counts."""

    name: str
    shown: str
    """The name in metrics: the function's alone."""
    function: Function
    weight: float
    columns: tuple[str, ...]
    """The columns that it cannot do without."""
    takes: frozenset[str] | None
    """The names that it may be called with; None where it takes any."""


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
        """Return what a reward is called with."""
        names = dict.fromkeys(name for row in self.rows for name in row if name != "prompt")
        columns = {name: [row.get(name) for row in self.rows] for name in names}
        given = {"completions": [*self.completions], "completion_ids": [list(i) for i in self.ids]}
        return columns | {"prompts": [row["prompt"] for row in self.rows]} | given

    def one(self, index: int) -> Answers:
        """Return one answer alone."""
        part = slice(index, index + 1)
        return Answers(self.rows[part], self.where[part], self.completions[part], self.ids[part])


@dataclass(frozen=True)
class Judge:
    """The rewards of a run."""

    rewards: tuple[Reward, ...]
    files: tuple[Path, ...]

    @property
    def needed(self) -> dict[str, str]:
        """The columns that every row must have something in, and the reward that reads each."""
        return {column: r.name for r in reversed(self.rewards) for column in r.columns}

    @property
    def sha256(self) -> str | None:
        """Of the user's files; None where there are none."""
        return sha256_of(*self.files) if self.files else None

    def scores(
        self, answers: Answers, when: str, also: Mapping[str, Any] | None = None
    ) -> list[list[float]]:
        """Return what each reward gives each answer; NaN where a reward does not judge it.

        Args:
            answers: what is judged.
            when: `at step 3`, for errors.
            also: what else a reward may ask for.

        Raises:
            TrainingError: a reward raises or returns what is not one number an answer, or no
                reward judges an answer; names reward, row and step.
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
    """Call a reward with what it takes."""
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
    """Return some places, each once."""
    once = list(dict.fromkeys(places))
    more = f" and {len(once) - ROWS_NAMED} more rows" if len(once) > ROWS_NAMED else ""
    return "; ".join(once[:ROWS_NAMED]) + more


# Finding the rewards that a run names


def reward_problems(entries: Sequence[str | Mapping[str, Any]]) -> str | None:
    """Return what is wrong with a run's entries, as far as it can be told without the files."""
    try:
        for spec in map(spec_of, entries):
            if spec.file is None:
                built_in(spec)
    except UsageError as error:
        return str(error)
    return None


def judge_of(entries: Sequence[str | Mapping[str, Any]]) -> Judge:
    """Return the rewards that a run names; a user's file is run.

    Raises:
        UsageError: there is no such reward, file or function, an argument does not fit, or the
            file cannot be run.
    """
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


def spec_of(entry: str | Mapping[str, Any]) -> Spec:
    """Return one entry: a name, or a mapping with a name, a weight and arguments."""
    given = mapping_in(entry)
    name, weight = given.pop("name", None), given.pop("weight", 1.0)
    if not isinstance(name, str) or not name:
        raise UsageError(f"a reward needs a 'name', and {entry!r} has none")
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise UsageError(f"the reward {name!r}: 'weight' must be a number, not {weight!r}")
    return Spec(name, float(weight), given)


def mapping_in(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry as a mapping; on a command line it may be the text of one."""
    if not isinstance(entry, str):
        return dict(entry)
    if not entry.lstrip().startswith("{"):
        return {"name": entry}
    try:
        found = yaml.safe_load(entry)
    except yaml.YAMLError as error:
        raise UsageError(f"the reward {entry!r} is not YAML: {error}") from None
    return cast("dict[str, Any]", found)


def built_in(spec: Spec) -> Function:
    """Return a built-in reward with its arguments."""
    if spec.name not in BUILT_IN:
        raise UsageError(
            f"there is no reward {spec.name!r}; there are {', '.join(BUILT_IN)}, and functions of "
            f"a Python file, as rewards.py:function.{did_you_mean(spec.name, BUILT_IN)}"
        )
    make = BUILT_IN[spec.name]
    check_arguments(spec, inspect.signature(make))
    return make(**spec.arguments)


def check_arguments(spec: Spec, signature: inspect.Signature) -> None:
    """Raise when a reward does not take the arguments that it is given, or lacks one."""
    for name in map(str, spec.arguments):
        if name not in signature.parameters:
            known = ", ".join(signature.parameters) or "none"
            raise UsageError(
                f"the reward {spec.name!r} has no argument {name!r}; it has {known}."
                + did_you_mean(name, signature.parameters)
            )
    for name, parameter in signature.parameters.items():
        if (
            spec.file is None
            and parameter.default is parameter.empty
            and name not in spec.arguments
        ):
            raise UsageError(f"the reward {spec.name!r} needs the argument {name!r}")


def own(spec: Spec, module: Any) -> Function:
    """Return a function of the user's file with its arguments.

    Raises:
        UsageError: the file has no such function.
    """
    function = vars(module).get(spec.function)
    if not callable(function):
        known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(
            f"{spec.file} has no function {spec.function!r}; it has {', '.join(known) or 'none'}."
            + did_you_mean(spec.function, known)
        )
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"the reward {spec.name!r} is async; write it as an ordinary function")
    if spec.arguments:
        check_arguments(spec, inspect.signature(function))
    return cast("Function", partial(function, **spec.arguments) if spec.arguments else function)


def hash_of(path: Path) -> str:
    """Return the hash of a user's file.

    Raises:
        UsageError: it is not there.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}, which the rewards name; check the path")
    return sha256_of(path)


@cache
def module_of(path: Path, sha256: str) -> Any:
    """Run a user's file, once for what it holds, and return it.

    Raises:
        UsageError: running it raises.
    """
    name = f"rewards_{sha256[:16]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"{path} is no Python file; rewards are functions of a .py file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def reward_of(spec: Spec, shown: str, function: Function) -> Reward:
    """Return a function with what its signature says it takes, and cannot do without."""
    parameters = inspect.signature(function).parameters.values()
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named_ones = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    columns: tuple[str, ...] = getattr(function, "columns", ()) or tuple(
        p.name for p in named_ones if p.default is p.empty and p.name not in GIVEN
    )
    takes = None if any_name else frozenset(p.name for p in named_ones) - {*spec.arguments}
    return Reward(spec.name, shown, function, spec.weight, columns, takes)
