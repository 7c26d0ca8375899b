"""`inlay eval`: base and tuned on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from inlay.cli import show, summary
from inlay.cli.data import listed
from inlay.cli.options import Parser, checked, same
from inlay.cli.progress import progress
from inlay.data.read import place
from inlay.data.rows import Format
from inlay.run.config import Text
from inlay.run.flags import flags_of
from inlay.train.tasks import TASKS, check_keys

if TYPE_CHECKING:
    from inlay.cli.tuned import Tuned
    from inlay.data.rows import Rows
    from inlay.evaluate.record import ComparisonRecord

ABOUT = "Compare the base model and an adapter on the same rows; the folder says which base."
USAGE = "inlay eval --adapter DIR --data D [flags]"
EXAMPLES = """examples:
  inlay eval --adapter run --data test.jsonl
  inlay eval --adapter run --data test.csv --prompt question --completion answer --json"""

OWN = {"adapter", "data", "generate_rows", "generate_tokens", "batch_size", "threads"}
"""The flags that do not say how rows are read."""


class EvalOptions(BaseModel):
    """The flags of `inlay eval`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    adapter: Text = Field(description="folder of a run, or of an adapter")
    data: Text = Field(description="rows to measure on: a file, a hub id, or 'reports'")
    format: Format = same("format")
    prompt: Text | None = same("prompt")
    completion: Text | None = same("completion")
    text: Text | None = same("text")
    text_pair: Text | None = same("text_pair")
    label: Text | None = same("label")
    kind: Literal["auto", "single", "multi", "regression", "tokens"] | None = same("kind")
    anchor: Text | None = same("anchor")
    positive: Text | None = same("positive")
    negative: Text | None = same("negative")
    score: Text | None = same("score")
    skip_empty: bool = same("skip_empty")
    max_rows: PositiveInt | None = same("max_rows")
    max_length: PositiveInt = same("max_length")
    max_pixels: PositiveInt | None = same("max_pixels")
    allow_urls: bool | None = same("allow_urls")
    generate_rows: int = same("generate_rows")
    generate_tokens: PositiveInt = same("generate_tokens")
    batch_size: PositiveInt = same("batch_size")
    threads: PositiveInt | None = same("threads")


def parser(argv: Sequence[str]) -> Parser:
    """Return the verb's flags."""
    del argv
    found = Parser("eval", USAGE, ABOUT, EXAMPLES)
    found.add_flags("flags", flags_of(EvalOptions))
    found.add_switches(json="write JSON")
    return found


def run(given: dict[str, Any]) -> int:
    """Measure base and tuned, and show or write the comparison."""
    from inlay.cli.tuned import find_tuned, set_threads

    as_json = given.pop("json", False)
    options = checked(EvalOptions, given)
    tuned = find_tuned(options.adapter)
    check_keys(tuned.task, options.model_dump(exclude_unset=True))
    set_threads(options.threads)
    measured = measured_rows if TASKS[tuned.task].verbs else measured_answers
    found, rows, trained_on = measured(options, tuned)
    if as_json:
        about: dict[str, Any] = {"base": tuned.base, "adapter": str(tuned.adapter)}
        about |= {"data": options.data, "rows_held_out_by_the_run": trained_on}
        about |= {"skipped": rows.skipped}
        show.as_json({**about, "data_sha256": rows.sha256, **found})
        return 0
    summary.comparison(found, "held-out rows" if trained_on else "rows")
    summary.classes(found)
    if trained_on:
        print(f"  The run trained on {options.data} and held out these rows of {rows.source}.")
    elif rows.skipped:
        print(f"  left out for an empty field: {listed(rows.skipped)}")
    for example in found["examples"][:1]:
        summary.example(example, place(rows.source, example["line"]))
    return 0


def measured_answers(options: EvalOptions, tuned: Tuned) -> tuple[ComparisonRecord, Rows, bool]:
    """Return the comparison of a language model on rows, and whether its run held them out."""
    from inlay.cli.compared import Comparing
    from inlay.cli.rows import keys_for, rows_or_held_out
    from inlay.cli.tuned import load_tuned

    keys = keys_for(tuned.run, options.model_dump(exclude_unset=True))
    rows, trained_on = rows_or_held_out(tuned, options.data, keys)
    with progress() as drawn:
        drawn.stage(f"loading {tuned.base} with {tuned.adapter}")
        model, tokenizer = load_tuned(tuned)

        limits: dict[str, Any] = {
            "generate_rows": options.generate_rows,
            "max_new_tokens": options.generate_tokens,
            "batch_size": options.batch_size,
            "on_progress": drawn.working,
        }
        longest = options.model_dump(exclude_unset=True).get("generate_tokens")
        given = (keys["max_length"], limits, longest, keys["max_pixels"])
        found = Comparing(tuned, model, tokenizer, rows, *given).record()
    return found, rows, trained_on


def measured_rows(options: EvalOptions, tuned: Tuned) -> tuple[ComparisonRecord, Rows, bool]:
    """Return the comparison of a model with a head on rows, and whether its run held them out."""
    from inlay.cli.rows import rows_for_task
    from inlay.cli.tuned import load_tuned

    given = options.model_dump(exclude_unset=True, exclude=OWN)
    config, rows, trained_on = rows_for_task(tuned, options.data, given)
    with progress() as drawn:
        drawn.stage(f"loading {tuned.base} with {tuned.adapter}")
        model, tokenizer = load_tuned(tuned)
        measure = import_module(TASKS[tuned.task].verbs).measure
        limits = {"batch_size": options.batch_size, "on_progress": drawn.working}
        found = measure(model, tokenizer, rows, config, **limits)
    return found, rows, trained_on
