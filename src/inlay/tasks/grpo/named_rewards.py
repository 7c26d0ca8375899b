"""The rewards that a run names: built-in ones, and functions of the user's file."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from numbers import Real
from pathlib import Path
from typing import Any, cast

import yaml

from inlay.errors import UsageError, did_you_mean
from inlay.files import sha256_of
from inlay.tasks.grpo.rewards import BUILT_IN, Function

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a reward may ask for beside the columns of the rows, as in TRL."""


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


def reward_problems(entries: Sequence[str | Mapping[str, Any]]) -> str | None:
    """Return what is wrong with a run's entries, as far as it can be told without the files."""
    try:
        for spec in map(spec_of, entries):
            if spec.file is None:
                built_in(spec)
    except UsageError as error:
        return str(error)
    return None


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
    """Return a function of the user's file with its arguments."""
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
    """Return the hash of a user's file."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}, which the rewards name; check the path")
    return sha256_of(path)


@cache
def module_of(path: Path, sha256: str) -> Any:
    """Run a user's file, once for what it holds, and return it."""
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
