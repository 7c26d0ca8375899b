"""The run that a run file and flags define, its task's own keys and the method's among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from inlay.errors import UsageError
from inlay.methods.catalog import catalog
from inlay.run.config import RunConfig
from inlay.run.flags import Flag, flags_of, from_text
from inlay.run.hyperparameters import checked_hyperparameters, method_flags, method_of
from inlay.run.run_file import read_yaml
from inlay.run.sentences import located, validated, wrong
from inlay.tasks import TASKS, check_task, no_such_task, owners


@cache
def run_keys() -> Mapping[str, FieldInfo]:
    """Return the keys of a run, every task's own keys included."""
    own = {k: f for task in TASKS.values() for k, f in task.options.model_fields.items()}
    return {**RunConfig.model_fields, **own}


def flags() -> list[Flag]:
    """Return a flag for every key of a run but `hyperparameters`; a task's own have no default."""
    found = {flag.key: flag for flag in flags_of(RunConfig)}
    for task in TASKS.values():
        own = (flag for flag in flags_of(task.options) if flag.key not in RunConfig.model_fields)
        found |= {flag.key: replace(flag, default=None) for flag in own}
    found.pop("hyperparameters")
    return list(found.values())


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, object] | None = None
) -> RunConfig:
    """Return the run that a YAML file and overrides (flags) define; overrides win.

    An override may be a value or the text of one (`"3"`, `["q_proj", "v_proj"]`, `["a=1"]`).

    Raises:
        UsageError: with one line for each problem of the file, its keys and its values.
    """
    lines: dict[str, int] = {}
    values: dict[str, object] = {}
    if path is not None:
        values, lines = read_yaml(Path(path))
    typed = parsed_overrides(overrides or {}, str(values.get("method", "lora")))
    for key in typed:
        lines.pop(key, None)
    return checked_config({**values, **typed}, source=str(path or ""), lines=lines)


def checked_config(
    values: Mapping[str, object], *, source: str = "", lines: Mapping[str, int] | None = None
) -> RunConfig:
    """Return the run these keys define, hyperparameters of the method among them."""
    own = {k: v for k, v in values.items() if k in run_keys()}
    rest = {k: v for k, v in values.items() if k not in run_keys()}
    method, problems = method_of(own.get("method", RunConfig.model_fields["method"].default))
    nested = own.pop("hyperparameters", {})
    if not isinstance(nested, dict) or not all(isinstance(k, str) for k in nested):
        problems["hyperparameters"] = wrong(
            "hyperparameters", nested, "a mapping from names to values"
        )
        nested = {}
    for key in nested.keys() & rest.keys():
        problems[key] = f"{key!r} is given twice, by itself and in 'hyperparameters'"
    if method:
        hyper, found = checked_hyperparameters(method, {**nested, **rest}, run_keys())
        own["hyperparameters"] = hyper
        problems |= found
    config, found = validated_run(own)
    problems |= {key: text for key, text in found.items() if key not in problems}
    if config is not None:
        problems |= contradictions(config)
    if problems or config is None:
        raise UsageError("\n".join(located(problems, source, lines or {})))
    return config.model_copy(update=TASKS[config.task].settled())


def validated_run(values: Mapping[str, Any]) -> tuple[RunConfig | None, dict[str, str]]:
    """Return the run of these keys, or None and a sentence for each key that is wrong.

    A task's own key that is null is as one that is not given.
    """
    name = values.get("task", RunConfig.model_fields["task"].default)
    known = isinstance(name, str) and name in TASKS
    options = TASKS[name].options if known else RunConfig
    own = {k: v for k, v in values.items() if k in RunConfig.model_fields or v is not None}
    foreign = own.keys() - options.model_fields.keys()
    config, problems = validated(options, {k: v for k, v in own.items() if k not in foreign})
    if isinstance(name, str) and not known:
        problems["task"] = no_such_task(name)
    if known:
        problems |= {key: owners(key, name) for key in sorted(foreign)}
    return config if known and isinstance(config, RunConfig) else None, problems


def contradictions(config: RunConfig) -> dict[str, str]:
    """Return the problems of keys that are right by themselves and wrong together."""
    problems = check_task(config)
    if abs(sum(config.split) - 1) > 1e-6:
        total = f"{sum(config.split):g}"
        problems["split"] = f"'split' must add up to 1; {config.split} adds up to {total}"
    elif config.split[0] == 0:
        problems["split"] = f"'split' {config.split} leaves nothing to train on"
    if config.resume and config.overwrite:
        problems["resume"] = "'resume' and 'overwrite' exclude each other; give one of them"
    if config.text and (config.prompt or config.completion):
        problems["text"] = (
            "'text' trains on a whole column, so it excludes 'prompt' and 'completion'"
        )
    elif bool(config.prompt) != bool(config.completion) and TASKS[config.task].needs_answers:
        given, lacking = ("prompt", "completion") if config.prompt else ("completion", "prompt")
        problems[given] = f"{given!r} needs {lacking!r} beside it; name both, or neither"
    if config.format != "auto" and (config.text or config.prompt or config.completion):
        problems["format"] = "'format' and named columns exclude each other; give one of them"
    return problems


def parsed_overrides(overrides: Mapping[str, object], method: str) -> dict[str, object]:
    """Return overrides with the text of flags turned into values; None means not given."""
    given = {k: v for k, v in overrides.items() if v is not None}
    name = str(given.get("method", method))
    known = {flag.key: flag for flag in flags()}
    if name in catalog():
        known |= {flag.key: flag for flag in method_flags(name)}
    return {k: from_text(known[k], v) if k in known else v for k, v in given.items()}
