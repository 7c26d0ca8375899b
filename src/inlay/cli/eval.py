"""`inlay eval`: base and tuned on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from inlay.cli import show, summary
from inlay.cli.options import Parser, checked, same
from inlay.cli.progress import progress
from inlay.data.rows import Format
from inlay.train.config import Text, flags_of

ABOUT = "Compare the base model and an adapter on the same rows; the folder says which base."
USAGE = "inlay eval --adapter DIR --data D [flags]"
EXAMPLES = """examples:
  inlay eval --adapter run --data test.jsonl
  inlay eval --adapter run --data test.csv --prompt question --completion answer --json"""


class EvalOptions(BaseModel):
    """What `inlay eval` can be told."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    adapter: Text = Field(description="folder of a run, or of an adapter")
    data: Text = Field(description="rows to measure on: a file, a hub id, or 'reports'")
    format: Format = same("format")
    prompt: Text | None = same("prompt")
    completion: Text | None = same("completion")
    text: Text | None = same("text")
    skip_empty: bool = same("skip_empty")
    max_rows: PositiveInt | None = same("max_rows")
    max_length: PositiveInt = same("max_length")
    generate_rows: int = same("generate_rows")
    generate_tokens: PositiveInt = same("generate_tokens")
    batch_size: PositiveInt = same("batch_size")
    threads: PositiveInt | None = same("threads")


def parser(argv: Sequence[str]) -> Parser:
    """Return the verb's flags."""
    del argv
    found = Parser("eval", USAGE, ABOUT, EXAMPLES)
    found.add_flags("flags", flags_of(EvalOptions))
    found.add_switches(json="write JSON for a machine")
    return found


def run(given: dict[str, Any]) -> int:
    """Measure base and tuned, and show or write the comparison."""
    from inlay.cli.compared import Comparing
    from inlay.cli.rows import held_out, keys_for, rows_of
    from inlay.cli.tuned import find_tuned, load_tuned, set_threads

    as_json = given.pop("json", False)
    options = checked(EvalOptions, given)
    tuned = find_tuned(options.adapter)
    keys = keys_for(tuned.run, options.model_dump(exclude_unset=True))
    rows = rows_of(options.data, keys)
    trained_on = rows.sha256 == tuned.trained_on
    rows = held_out({**tuned.run, "data": options.data}) if trained_on else rows
    set_threads(options.threads)
    with progress() as drawn:
        drawn.stage(f"loading {tuned.base} with {tuned.adapter}")
        model, tokenizer = load_tuned(tuned)

        limits: dict[str, Any] = {
            "generate_rows": options.generate_rows,
            "max_new_tokens": options.generate_tokens,
            "batch_size": options.batch_size,
            "on_progress": drawn.working,
        }
        longest = keys["max_length"]
        found = Comparing(tuned, model, tokenizer, rows, longest, limits).record()
    if as_json:
        about = {"base": tuned.base, "adapter": str(tuned.adapter), "data": options.data}
        about |= {"rows_held_out_by_the_run": trained_on}
        show.as_json({**about, "data_sha256": rows.sha256, **found})
        return 0
    summary.comparison(found, "held-out rows" if trained_on else "rows")
    if trained_on:
        print(f"  The run trained on {options.data}: these are the rows that it held out.")
    for example in found["examples"][:1]:
        summary.example(example, f"{options.data}, row of line {example['line']}")
    return 0
