"""`inlay data`: the data as training will see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from inlay.cli import show
from inlay.cli.options import Parser, checked
from inlay.cli.train import add_run, config_from
from inlay.data.read import BUILT_IN, READERS
from inlay.errors import UsageError
from inlay.run.config import RunConfig
from inlay.run.flags import flags_of
from inlay.tasks import TASKS

if TYPE_CHECKING:
    from inlay.data.summary import Summary
    from inlay.train.overview import LabelledRows, Overview, RowShown, TextRows
    from inlay.train.rows import RunRows

ABOUT = (
    "Show the data as training will see it: counts, token lengths, what is cut, and rows with\n"
    "every token marked by whether it is trained on. Takes a run file or the flags of `train`."
)
USAGE = """inlay data DATA [--model M] [--task T] [flags]
       inlay data RUN.yaml [flags]"""
EXAMPLES = """examples:
  inlay data reports --model pocket
  inlay data pairs.jsonl --task dpo
  inlay data labelled.jsonl --task kto
  inlay data reviews.csv --task classify --label stars --model FOLDER
  inlay data problems.jsonl --task grpo --rewards final_number
  inlay data --data my.csv --prompt question --completion answer --model Qwen/Qwen3-0.6B
  inlay data run.yaml --show 5"""
ASSUMED = "  Tokens are pocket's; name another model with --model."


class DataOptions(BaseModel):
    """What `inlay data` can be told beside the keys of a run."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    show: NonNegativeInt = Field(3, description="rows to show token by token")


def parser(argv: Sequence[str]) -> Parser:
    found = Parser("data", USAGE, ABOUT, EXAMPLES)
    add_run(found, argv, shown=("model", "data"))
    found.add_flags("rows to show", flags_of(DataOptions))
    found.add_switches(json="write JSON")
    return found


def run(given: dict[str, Any]) -> int:
    as_json = given.pop("json", False)
    options = checked(DataOptions, {key: given.pop(key) for key in ("show",) if key in given})
    data_named(given)
    assumed = "model" not in given and "run_file" not in given
    config = config_from({"output": "unused"} | ({"model": "pocket"} if assumed else {}) | given)

    from inlay.model.load.folder import located
    from inlay.train.overview import TextRows
    from inlay.train.rows import rows_of_run

    task = TASKS[config.task]
    rows = rows_of_run(config)
    read = task.run(config)
    read.read_by(located(config.model, config.revision), rows.train.pictured)
    read.learn(rows)
    found = read.overview(rows, options.show)
    if as_json:
        show.as_json(as_record(config, rows, found))
        return 0
    if not isinstance(found, TextRows):
        draw_labelled_rows(config, rows, found)
    else:
        draw_text_rows(config, rows, found)
    if assumed:
        print(ASSUMED)
    if isinstance(found, TextRows):
        for row in found.shown:
            draw_row(row, marks=found.cut)
    return 0


def as_record(config: RunConfig, rows: RunRows, found: Overview) -> dict[str, Any]:
    from inlay.train.overview import TextRows

    about: dict[str, Any] = {"data": config.data, "model": config.model}
    about |= {"sha256": rows.sha256, "notes": rows.train.notes}
    if not isinstance(found, TextRows):
        return about | asdict(found)
    parts = {name: asdict(part) for name, part in found.parts.items()}
    return about | {"max_length": config.max_length, "kind": rows.train.kind, "parts": parts}


def draw_text_rows(config: RunConfig, rows: RunRows, found: TextRows) -> None:
    limit = "cut at" if found.cut else "of at most"
    show.heading(f"{config.data}: rows of {found.in_words}, {limit} {config.max_length} tokens")
    columns = ("part", "rows", "tokens", "trained on", "median", "95%", "longest", "cut")
    show.table(columns, [cells(name, part) for name, part in found.parts.items()])
    tell_notes(rows)
    for sentence in found.also:
        print(f"  {sentence}")
    for name, part in found.parts.items():
        for sentence in remarks(part):
            print(f"  {name}: {sentence}")


def draw_labelled_rows(config: RunConfig, rows: RunRows, found: LabelledRows) -> None:
    show.heading(f"{config.data}: rows of kind {found.kind}, cut at {found.longest} tokens")
    columns = ("part", "rows", "tokens", "median", "95%", "longest", "cut")
    counts = {n: (p.rows, p.tokens, p.median, p.p95, p.longest) for n, p in found.parts.items()}
    cells = [
        [name, *(f"{number:,}" for number in numbers), f"{len(found.parts[name].cut):,}"]
        for name, numbers in counts.items()
    ]
    show.table(columns, cells)
    tell_notes(rows)
    labels = {name: part.labels for name, part in found.parts.items() if part.labels}
    if labels:
        show.heading("labels")
        every = dict.fromkeys(label for part in labels.values() for label in part)
        lines = [[x, *(f"{part.get(x, 0):,}" for part in labels.values())] for x in every]
        show.table(("label", *labels), lines)
    for name, part in found.parts.items():
        if part.cut:
            print(f"  {name}: rows cut, their end is not seen: {listed(part.cut)}")
    for example in found.examples:
        show.heading(example.where)
        show.masked(example.pieces, example.marked)
        print(f"  -> {example.answer}")


def draw_row(row: RowShown, marks: bool) -> None:
    show.heading(row.where + (f", {legend()}" if marks else ""))
    for side, pieces in row.sides.items():
        if side:
            print(f"{side}:")
        show.masked([piece.text for piece in pieces], [piece.trained for piece in pieces])
    if row.columns:
        show.facts([(name, str(value)) for name, value in row.columns.items()])


def data_named(given: dict[str, Any]) -> None:
    """Take the data's name from the run file's place; UsageError where data are named twice."""
    word = given.get("run_file", "")
    if word not in BUILT_IN and Path(word).suffix.lower() not in READERS:
        return
    if "data" in given:
        raise UsageError(
            f"the data are named twice, {word!r} and {given['data']!r}; name them once"
        )
    given["data"] = given.pop("run_file")


def tell_notes(rows: RunRows) -> None:
    for note in rows.train.notes:
        print(f"  {note}")
    if rows.train.skipped:
        print(f"  left out for an empty field: {listed(rows.train.skipped)}")


def cells(name: str, found: Summary) -> list[str]:
    share = f"{found.trained_tokens:,} ({found.trained_tokens / found.tokens:.0%})"
    share = share if found.trained_tokens else "none"
    lengths = (found.lengths.median, found.lengths.p95, found.lengths.max, len(found.truncated))
    counts = [f"{number:,}" for number in lengths]
    return [name, f"{found.rows:,}", f"{found.tokens:,}", share, *counts]


def remarks(found: Summary) -> Iterator[str]:
    if found.truncated:
        yield f"rows cut, their end is not seen: {listed(found.truncated)}"
    if found.unended and found.trained_tokens:
        yield f"rows that do not teach the model to stop: {listed(found.unended)}"
    if found.unlike_prompt:
        yield f"rows whose prompt is other tokens when used alone: {listed(found.unlike_prompt)}"


def listed(lines: Sequence[int]) -> str:
    from inlay.data.rows import first_lines

    return f"{len(lines):,} (line {first_lines(lines)})"


def legend() -> str:
    return "trained tokens in green" if show.on_terminal() else "trained tokens in [brackets]"
