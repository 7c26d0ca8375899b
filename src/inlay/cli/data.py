"""`inlay data`: the data as training will see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
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
from inlay.train.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inlay.data.processor import ImageReader
    from inlay.data.rows import Rows
    from inlay.data.tokens import Encoded, Piece, Summary
    from inlay.train.overview import Overview
    from inlay.train.rows import RunRows

    Sides = dict[str, tuple[Rows, Sequence[Encoded]]]
    """What a part's rows are as tokens: the name of each side -> its rows and those as tokens."""

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
KINDS = {"preference": "preferences", "labelled": "labelled answers", "prompt": "prompts"}
"""What rows are in words, where their kind's own name does not say it."""
ASSUMED = "  Tokens are pocket's; name another model with --model."


class DataOptions(BaseModel):
    """What `inlay data` can be told beside the keys of a run."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    show: NonNegativeInt = Field(3, description="rows to show token by token")


def parser(argv: Sequence[str]) -> Parser:
    """Return the verb's flags."""
    found = Parser("data", USAGE, ABOUT, EXAMPLES)
    add_run(found, argv, shown=("model", "data"))
    found.add_flags("rows to show", flags_of(DataOptions))
    found.add_switches(json="write JSON")
    return found


def run(given: dict[str, Any]) -> int:
    """Read, check, divide and encode the rows as training would, and show them."""
    as_json = given.pop("json", False)
    options = checked(DataOptions, {key: given.pop(key) for key in ("show",) if key in given})
    data_named(given)
    assumed = "model" not in given and "run_file" not in given
    config = config_from({"output": "unused"} | ({"model": "pocket"} if assumed else {}) | given)

    from inlay.train.rows import rows_of_run

    rows = rows_of_run(config)
    tokenizer = reader_for(config, rows.train)
    if TASKS[config.task].verbs:
        from inlay.train.overview import overview_of

        reading = import_module(TASKS[config.task].verbs).reading(config, rows.train, tokenizer)
        show_overview(config, rows, overview_of(reading, rows, options.show), as_json)
        if assumed and not as_json:
            print(ASSUMED)
        return 0
    parts = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    encoded = {name: sides(config, part, tokenizer) for name, part in parts.items() if part}
    summaries = summaries_of(encoded)
    if as_json:
        show.as_json(as_record(config, rows, summaries))
        return 0
    describe(config, rows, summaries)
    if assumed:
        print(ASSUMED)
    for index in range(min(options.show, len(rows.train))):
        show_row(rows.train, index, encoded["train"], tokenizer)
    return 0


def summaries_of(encoded: Mapping[str, Sides]) -> dict[str, Summary]:
    """Return the counts and lengths of each side of each part."""
    from inlay.data.tokens import summarise

    return {
        f"{name} {side}".strip(): summarise(found, part)
        for name, both in encoded.items()
        for side, (part, found) in both.items()
    }


def as_record(config: RunConfig, rows: RunRows, summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """Return what is to be known of the rows for a machine."""
    return {
        "data": config.data,
        "model": config.model,
        "max_length": config.max_length,
        "kind": rows.train.kind,
        "sha256": rows.sha256,
        "notes": rows.train.notes,
        "parts": {name: asdict(found) for name, found in summaries.items()},
    }


def show_overview(config: RunConfig, rows: RunRows, found: Overview, as_json: bool) -> None:
    """Write the rows of a task on labels or similar texts."""
    if as_json:
        about: dict[str, Any] = {"data": config.data, "model": config.model}
        about |= {"sha256": rows.sha256, "notes": rows.train.notes}
        show.as_json(about | asdict(found))
        return
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


def show_row(rows: Rows, index: int, encoded: Sides, reader: Any) -> None:
    """Write each side of a row; of a prompt alone, the columns beside it."""
    alone = rows.kind == "prompt"
    show.heading(rows.where(index) + ("" if alone else f", {legend()}"))
    row = rows.rows[index]
    for side, (part, found) in encoded.items():
        for own, tokens in zip(part.rows, found, strict=True):
            if own is row:
                show_side(side, drawn(tokens, reader))
    if alone:
        columns = rows.rows[index].items()
        show.facts([(name, str(value)) for name, value in columns if name != "prompt"])


def show_side(side: str, row: Sequence[Piece]) -> None:
    """Write a row's text with its marks, after what it is where rows are of several kinds."""
    if side:
        print(f"{side}:")
    show.masked([piece.text for piece in row], [piece.trained for piece in row])


def data_named(given: dict[str, Any]) -> None:
    """Take the one word for the data, if it is the name of such and not a run file's.

    Raises:
        UsageError: the data are named twice.
    """
    word = given.get("run_file", "")
    if word not in BUILT_IN and Path(word).suffix.lower() not in READERS:
        return
    if "data" in given:
        raise UsageError(
            f"the data are named twice, {word!r} and {given['data']!r}; name them once"
        )
    given["data"] = given.pop("run_file")


def reader_for(config: RunConfig, rows: Rows) -> Any:
    """Return what writes the rows as tokens: the model's tokenizer, or its processor."""
    from inlay.data.processor import image_reader
    from inlay.model.load.folder import located
    from inlay.model.load.tokenizer import read_tokenizer

    folder = located(config.model, config.revision)
    if rows.pictured:
        return image_reader(folder, config.max_pixels)
    return read_tokenizer(folder, False)


def drawn(row: Any, reader: PreTrainedTokenizerBase | ImageReader) -> list[Piece]:
    """Return a row's text token by token."""
    from inlay.data.processor import ImageReader
    from inlay.data.tokens import pieces
    from inlay.data.vision import shown

    return shown(row, reader) if isinstance(reader, ImageReader) else pieces(row, reader)


def sides(config: RunConfig, rows: Rows, tokenizer: Any) -> Sides:
    """Return rows as tokens; of preferences both answers, labelled ones by label, by name."""
    from inlay.data.labelled import by_label
    from inlay.train.rows import encode_labelled_rows, encode_pair_rows, encode_rows

    if rows.kind == "preference":
        pairs = encode_pair_rows(rows, tokenizer, config.max_length)
        both = ([p.chosen for p in pairs], [p.rejected for p in pairs])
        return {"chosen": (rows, both[0]), "rejected": (rows, both[1])}
    if rows.kind == "labelled":
        found = encode_labelled_rows(rows, tokenizer, config.max_length)
        parts = dict(zip(("desirable", "undesirable"), by_label(rows), strict=True))
        return {n: (rows.take(p), [found[i].answer for i in p]) for n, p in parts.items() if p}
    return {"": (rows, encode_rows(rows, tokenizer, config.max_length))}


def describe(config: RunConfig, rows: RunRows, summaries: Mapping[str, Summary]) -> None:
    """Write counts and lengths, then what a user should know before training."""
    kind = KINDS.get(rows.train.kind, rows.train.kind.replace("_", " and "))
    kind += " about images" * (rows.train.pictured and rows.train.kind in KINDS)
    limit = "of at most" if rows.train.kind == "prompt" else "cut at"
    show.heading(f"{config.data}: rows of {kind}, {limit} {config.max_length} tokens")
    columns = ("part", "rows", "tokens", "trained on", "median", "95%", "longest", "cut")
    show.table(columns, [cells(name, found) for name, found in summaries.items()])
    tell_notes(rows)
    from inlay.train.judge import judge_of

    for reward in judge_of(config.rewards or []).rewards:
        reads = f", reads {' and '.join(map(repr, reward.columns))}" if reward.columns else ""
        print(f"  the reward {reward.name}: weight {reward.weight:g}{reads}")
    for name, found in summaries.items():
        for sentence in remarks(found):
            print(f"  {name}: {sentence}")


def tell_notes(rows: RunRows) -> None:
    """Write what is worth knowing of how the rows were read, and which were left out."""
    for note in rows.train.notes:
        print(f"  {note}")
    if rows.train.skipped:
        print(f"  left out for an empty field: {listed(rows.train.skipped)}")


def cells(name: str, found: Summary) -> list[str]:
    """Return the table's cells for one part of the rows."""
    share = f"{found.trained_tokens:,} ({found.trained_tokens / found.tokens:.0%})"
    share = share if found.trained_tokens else "none"
    lengths = (found.lengths.median, found.lengths.p95, found.lengths.max, len(found.truncated))
    counts = [f"{number:,}" for number in lengths]
    return [name, f"{found.rows:,}", f"{found.tokens:,}", share, *counts]


def remarks(found: Summary) -> Iterator[str]:
    """Yield a sentence for everything that is worth a look."""
    if found.truncated:
        yield f"rows cut, their end is not seen: {listed(found.truncated)}"
    if found.unended and found.trained_tokens:
        yield f"rows that do not teach the model to stop: {listed(found.unended)}"
    if found.unlike_prompt:
        yield f"rows whose prompt is other tokens when used alone: {listed(found.unlike_prompt)}"


def listed(lines: Sequence[int]) -> str:
    """Return how many lines, and the first of them."""
    from inlay.data.rows import first_lines

    return f"{len(lines):,} (line {first_lines(lines)})"


def legend() -> str:
    """Return what the marks mean."""
    return "trained tokens in green" if show.on_terminal() else "trained tokens in [brackets]"
