"""The rows that a verb's flags, or the run beside an adapter, mean; read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from inlay.data.images import normalise_shown
from inlay.data.labelled import are_labelled, desirable_of
from inlay.data.preference import are_pairs, side_of
from inlay.data.prompts import are_prompts, normalise_prompts
from inlay.data.read import RawRow, read_rows
from inlay.data.rows import Rows
from inlay.errors import DataError, UsageError
from inlay.run.config import RunConfig, checked_config
from inlay.train.judge import judge_of
from inlay.train.rows import NOT_SUPERVISED, check_unseen, read, rows_of_run
from inlay.train.tasks import TASKS

if TYPE_CHECKING:
    from inlay.cli.tuned import Tuned

COLUMNS = ("format", "prompt", "completion", "text")
"""The keys that say which columns of the data are used, and how."""
KINDS = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}
"""What transformers calls a problem -> the kind of label."""
DIVIDING = (*COLUMNS, "text_pair", "anchor")
"""The keys of columns whose content decides how rows are divided, where no other column does."""
READING = ("max_length", "max_rows", "skip_empty", "max_pixels", "allow_urls")
"""The keys that say which rows are used, and how much of them."""


def rows_of(source: str, keys: Mapping[str, Any]) -> Rows:
    """Read and check the rows of a source as the keys ask for, or as their fields tell.

    So are prompts, where the keys have rewards that judge the answers to them.

    Raises:
        DataError: the data are not there, malformed, empty, or a row lacks what it needs.
    """
    named = {key: keys[key] for key in COLUMNS if keys.get(key) is not None}
    rows = read_rows(source)[: keys.get("max_rows")]
    task, urls = keys.get("task", "sft"), bool(keys.get("allow_urls"))
    check_unseen(task, rows, {**named, "group": keys.get("split_by")})
    needed = judge_of(keys["rewards"]).needed if keys.get("rewards") else None
    if needed is not None and are_prompts(rows[0], keys.get("prompt"), needed):
        empty = keys.get("skip_empty", False)
        return normalise_prompts(rows, prompt=keys.get("prompt"), needed=needed, skip_empty=empty)
    check = None
    if named.get("format", "auto") == "auto" and len(named) <= 1:
        check = NOT_SUPERVISED.get(kind_of(rows[0], task))
    if check is not None:
        column = keys.get("split_by")
        group = column if column in rows[0].values else None
        empty = keys.get("skip_empty", False)
        return check(rows, group=group, skip_empty=empty, allow_urls=urls)
    named["skip_empty"] = keys.get("skip_empty", False)
    return normalise_shown(rows, allow_urls=urls, **named)


def kind_of(row: RawRow, task: str) -> str:
    """Return what a row looks like; a label counts only where the run's task knows labels."""
    if are_pairs(row):
        return "preference"
    labels = task in TASKS and TASKS[task].rows == "labelled"
    return "labelled" if labels and are_labelled(row) else "supervised"


def keys_for(run: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys to read rows with: the flags, else the run's, else the defaults.

    A flag that names a column replaces all the columns of the run.
    """
    defaults = {key: RunConfig.model_fields[key].get_default() for key in (*READING, *COLUMNS)}
    kept = ["max_length", "skip_empty", "split_by", "task", "rewards", "max_pixels", "allow_urls"]
    if not any(key in given for key in COLUMNS):
        kept += COLUMNS
    from_run = {key: run[key] for key in kept if key in run}
    return defaults | from_run | {key: given[key] for key in defaults if key in given}


def answers(rows: Rows) -> Rows:
    """Return rows with one answer each: the preferred one, or those labelled desirable."""
    if rows.kind == "labelled":
        return desirable_of(rows)
    return side_of(rows, "chosen") if rows.kind == "preference" else rows


def held_out(run: Mapping[str, Any]) -> Rows:
    """Return the rows that a run kept aside for its last measurement."""
    return rows_of_run(checked_config(run, source="run.json")).test


def rows_or_held_out(tuned: Tuned, data: str, keys: Mapping[str, Any]) -> tuple[Rows, bool]:
    """Return the rows of data, of the run's own those that it held out, and whether it is that.

    Raises:
        UsageError: as `divided_alike`.
        DataError: as `rows_of`, or the run held no row out.
    """
    most = tuned.run.get("max_rows")
    rows = rows_of(data, {**keys, "max_rows": most})
    if rows.sha256 == tuned.trained_on:
        asked = {key: keys[key] for key in COLUMNS}
        divided_alike(tuned.run, asked, data)
        kept = held_out({**tuned.run, **asked, "data": data})
        return some_of(kept, keys["max_rows"], data), True
    return rows if keys["max_rows"] == most else rows_of(data, keys), False


def divided_alike(run: Mapping[str, Any], asked: Mapping[str, Any], data: str) -> None:
    """Raise where other columns would divide a run's data otherwise than the run did.

    Raises:
        UsageError: naming the columns.
    """
    other = [k for k in DIVIDING if k in asked and asked[k] != run.get(k)]
    if other and not run.get("split_by") and not run.get("eval_data"):
        flags = " and ".join("--" + key.replace("_", "-") for key in other)
        raise UsageError(
            f"the run trained on {data}, and which rows it held out is told by its own columns; "
            f"leave {flags} out, or give rows of another file"
        )


def some_of(kept: Rows, count: int | None, data: str) -> Rows:
    """Return the first of the rows that a run held out.

    Raises:
        DataError: there are none.
    """
    if not len(kept):
        raise DataError(f"the run trained on all rows of {data} and held none out; give other rows")
    return at_most(kept, count)


def at_most(rows: Rows, count: int | None) -> Rows:
    """Return the first rows, or all of them without a count."""
    return rows if count is None else rows.take(range(min(count, len(rows))))


def rows_for_task(
    tuned: Tuned, data: str | None, given: Mapping[str, Any]
) -> tuple[RunConfig, Rows, bool]:
    """Return rows as a model with a head reads them, and whether its run held them out.

    Flags replace the run's keys; without data, or with the run's own, its held-out rows are meant.
    The run returned is the one whose data were trained on.

    Raises:
        UsageError: as `divided_alike`.
        DataError: the rows are not there or malformed, or data are given and none was held out.
    """
    asked = {key: value for key, value in given.items() if key != "max_rows"}
    config, most = run_of(tuned, asked), given.get("max_rows")
    own = config if data is None else config.model_copy(update={"data": data})
    if data is None:
        return own, at_most(rows_of_run(own).test, most), True
    if read(own, data, group=None).sha256 == tuned.trained_on:
        divided_alike(tuned.run, asked, data)
        return own, some_of(rows_of_run(own).test, most, data), True
    return config, read(own.model_copy(update={"max_rows": most}), own.data, group=None), False


def run_of(tuned: Tuned, given: Mapping[str, Any]) -> RunConfig:
    """Return the run an adapter came from, or one of its task where none lies beside it."""
    bare = {"model": tuned.base, "task": tuned.task, "data": "unused", "output": "unused"}
    trained = {"kind": label_kind(tuned.head)} if tuned.task == "classify" else {}
    return checked_config({**(tuned.run or bare), **trained, **given}, source="run.json")


def label_kind(head: Mapping[str, Any] | None) -> str:
    """Return the kind of label that a head predicts."""
    said = head or {}
    if said.get("purpose") == "tokens":
        return "tokens"
    return KINDS.get(str(said.get("problem")), "auto")
