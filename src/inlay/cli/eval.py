"""`inlay eval`: base and tuned on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from inlay.cli import show, summary
from inlay.cli.data import listed
from inlay.cli.options import Parser, checked, same
from inlay.cli.progress import progress
from inlay.data.raw import place
from inlay.data.rows import Format
from inlay.run.config import Text
from inlay.run.flags import flags_of
from inlay.tasks import check_keys

if TYPE_CHECKING:
    from inlay.cli.rows import Measured
    from inlay.cli.tuned import Tuned
    from inlay.evaluate.comparison import Limits
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
    del argv
    found = Parser("eval", USAGE, ABOUT, EXAMPLES)
    found.add_flags("flags", flags_of(EvalOptions))
    found.add_switches(json="write JSON")
    return found


def run(given: dict[str, Any]) -> int:
    from inlay.cli.tuned import find_tuned, set_threads

    as_json = given.pop("json", False)
    options = checked(EvalOptions, given)
    tuned = find_tuned(options.adapter)
    check_keys(tuned.task.name, options.model_dump(exclude_unset=True))
    set_threads(options.threads)
    record, found = measured(options, tuned)
    rows = found.rows
    if as_json:
        about: dict[str, Any] = {"base": tuned.base, "adapter": str(tuned.adapter)}
        about |= {"data": options.data, "rows_held_out_by_the_run": found.held_out}
        about |= {"skipped": rows.skipped}
        show.as_json({**about, "data_sha256": rows.sha256, **record})
        return 0
    what = "held-out rows" if found.held_out else "rows"
    summary.comparison(record, found.task.titles, what)
    summary.classes(record)
    if found.held_out:
        print(f"  The run trained on {options.data} and held out these rows of {rows.source}.")
    elif rows.skipped:
        print(f"  left out for an empty field: {listed(rows.skipped)}")
    for example in record["examples"][:1]:
        summary.example(example, place(rows.source, example["line"]))
    return 0


def measured(options: EvalOptions, tuned: Tuned) -> tuple[ComparisonRecord, Measured]:
    from inlay.cli.measuring import task_run_for
    from inlay.cli.rows import rows_to_measure
    from inlay.cli.tuned import load_tuned

    given = options.model_dump(exclude_unset=True)
    asked = {key: value for key, value in given.items() if key not in OWN}
    found = rows_to_measure(tuned, options.data, asked)
    with progress() as drawn:
        drawn.stage(f"loading {tuned.base} with {tuned.adapter}")
        model, _ = load_tuned(tuned)
        run = task_run_for(tuned, model, found)
        if "generate_tokens" in given:
            run.answer_at_most(options.generate_tokens)
        limits: Limits = {"batch_size": options.batch_size, "on_progress": drawn.working}
        if not found.task.has_head:
            limits["generate_rows"] = options.generate_rows
            limits["max_new_tokens"] = options.generate_tokens
        return run.compare(model, found.rows, run.encode(found.rows), limits), found
