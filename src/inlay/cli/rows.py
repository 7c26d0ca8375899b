"""The rows that a verb's flags, or the run beside an adapter, mean; read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inlay.cli.tuned import Tuned
from inlay.data.read import read_rows
from inlay.data.rows import Rows
from inlay.errors import DataError, UsageError
from inlay.run.config import RunConfig
from inlay.tasks import TASKS, Task, task_of_rows
from inlay.tasks.config import checked_config, run_keys
from inlay.train.rows import COLUMNS as WORDS
from inlay.train.rows import check_no_images, read, rows_of_run

COLUMNS = ("format", "prompt", "completion", "text")
"""The keys that say which columns of the data are used, and how."""
DIVIDING = (*COLUMNS, "text_pair", "anchor")
"""The keys of columns whose content decides how rows are divided, where no other column does."""
READING = ("max_length", "max_rows", "skip_empty", "max_pixels", "allow_urls")
"""The keys that say which rows are used, and how much of them."""


@dataclass(frozen=True)
class Measured:
    """Rows to measure on, the task whose measures they are for, and the run that reads them."""

    task: Task
    config: RunConfig
    rows: Rows
    held_out: bool = False
    """Whether the adapter's run held them out."""


def rows_to_measure(tuned: Tuned, data: str, given: Mapping[str, Any]) -> Measured:
    """Of the run's own data, return the held-out rows; flags replace the run's keys."""
    if tuned.task.has_head:
        return rows_for_head(tuned, data, given)
    keys, most = keys_for(tuned.run, given), tuned.run.get("max_rows")
    found = rows_of(data, tuned, {**keys, "max_rows": most})
    if found.rows.sha256 == tuned.trained_on:
        asked = {key: keys[key] for key in COLUMNS}
        check_divided_alike(tuned.run, asked, data)
        return held_out(tuned, {**asked, "data": data}, keys["max_rows"])
    return found if keys["max_rows"] == most else rows_of(data, tuned, keys)


def rows_named(tuned: Tuned, data: str | None, given: Mapping[str, Any]) -> Measured:
    if tuned.task.has_head:
        return rows_for_head(tuned, data, given)
    if data is None:
        return held_out(tuned, {}, None)
    return rows_of(data, tuned, keys_for(tuned.run, given))


def rows_for_head(tuned: Tuned, data: str | None, given: Mapping[str, Any]) -> Measured:
    asked = {key: value for key, value in given.items() if key != "max_rows"}
    config, most, task = run_of(tuned, asked), given.get("max_rows"), tuned.task
    own = config if data is None else config.model_copy(update={"data": data})
    if data is None:
        return Measured(task, own, at_most(rows_of_run(own).test, most), held_out=True)
    if read(own, data).sha256 == tuned.trained_on:
        check_divided_alike(tuned.run, asked, data)
        kept = some_of(rows_of_run(own).test, most, data)
        return Measured(task, own, kept, held_out=True)
    limited = own.model_copy(update={"max_rows": most})
    return Measured(task, config, read(limited, data))


def rows_of(source: str, tuned: Tuned | None, keys: Mapping[str, Any]) -> Measured:
    """Read rows as the keys ask for; DataError where they are missing or malformed."""
    raw = read_rows(source)[: keys.get("max_rows")]
    own = TASKS["sft"] if tuned is None else tuned.task
    named = {key: keys[key] for key in COLUMNS if keys.get(key) is not None}
    words = {key: keys.get(key) for key in WORDS}
    check_no_images(own, raw, words)
    columns = named.get("format", "auto") != "auto" or len(named) > 1
    prompts = bool(keys.get("rewards")) and own.fits(raw[0], keys)
    task = TASKS["sft"] if columns and not prompts else task_of_rows(raw[0], own, keys)
    config = run_to_measure(task, tuned, keys)
    return Measured(task, config, task.read(raw, config, None))


def run_to_measure(task: Task, tuned: Tuned | None, keys: Mapping[str, Any]) -> RunConfig:
    run: Mapping[str, Any] = tuned.run if tuned else {}
    own = {k: run[k] for k in task.options.model_fields if k in run and k not in keys}
    model = tuned.base if tuned else keys.get("model", "unused")
    found = {**own, **keys, "model": model, "data": "unused", "output": "unused", "task": task.name}
    foreign = task.fixed.keys() | (found.keys() - task.options.model_fields.keys())
    method = {} if tuned is None else run.get("hyperparameters", {})
    kept = {k: v for k, v in found.items() if k not in foreign and v is not None}
    return checked_config({**kept, "hyperparameters": method}, source="run.json")


def keys_for(run: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags, else the run's keys; one column flag replaces all the run's columns."""
    defaults = {key: run_keys()[key].get_default() for key in (*READING, *COLUMNS)}
    kept = ["max_length", "skip_empty", "split_by", "rewards", "max_pixels", "allow_urls"]
    if not any(key in given for key in COLUMNS):
        kept += COLUMNS
    from_run = {key: run[key] for key in kept if key in run}
    return defaults | from_run | {key: given[key] for key in defaults if key in given}


def held_out(tuned: Tuned, changed: Mapping[str, Any], most: int | None) -> Measured:
    """Return the run's rows for its last measurement; DataError where there are none."""
    config = checked_config({**tuned.run, **changed}, source="run.json")
    rows = rows_of_run(config).test
    if changed:
        rows = some_of(rows, most, config.data)
    return Measured(tuned.task, config, rows, held_out=True)


def check_divided_alike(run: Mapping[str, Any], asked: Mapping[str, Any], data: str) -> None:
    """Raise UsageError where other columns would divide a run's data otherwise."""
    other = [k for k in DIVIDING if k in asked and asked[k] != run.get(k)]
    if other and not run.get("split_by") and not run.get("eval_data"):
        flags = " and ".join("--" + key.replace("_", "-") for key in other)
        raise UsageError(
            f"the run trained on {data}, and which rows it held out is told by its own columns; "
            f"leave {flags} out, or give rows of another file"
        )


def some_of(kept: Rows, count: int | None, data: str) -> Rows:
    """Return the first of the held-out rows; DataError where there are none."""
    if not len(kept):
        raise DataError(f"the run trained on all rows of {data} and held none out; give other rows")
    return at_most(kept, count)


def at_most(rows: Rows, count: int | None) -> Rows:
    return rows if count is None else rows.take(range(min(count, len(rows))))


def run_of(tuned: Tuned, given: Mapping[str, Any]) -> RunConfig:
    """Return the run an adapter came from, or one of its task where none lies beside it."""
    bare = {"model": tuned.base, "task": tuned.task.name, "data": "unused", "output": "unused"}
    trained = tuned.task.keys_of_head(tuned.head or {})
    return checked_config({**(tuned.run or bare), **trained, **given}, source="run.json")
