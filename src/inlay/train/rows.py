"""The rows of a run: read, checked and divided, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.data.image_columns import hold_images
from inlay.data.raw import RawRow
from inlay.data.read import read_rows
from inlay.data.rows import Rows, first_lines
from inlay.data.split import content, split
from inlay.errors import DataError, UsageError
from inlay.run.config import RunConfig, RunWithImages
from inlay.train.task import TASKS, Task

if TYPE_CHECKING:
    from inlay.data.tokens import Reader

COLUMNS = (
    "prompt", "completion", "text", "text_pair", "label", "anchor", "positive", "negative",
    "score", "split_by",
)  # fmt: skip
"""The keys that name columns which are read as words."""


@dataclass(frozen=True)
class RunRows:
    """The rows a run trains on, and those it is measured on while it trains and at the end."""

    train: Rows
    validation: Rows
    test: Rows

    @property
    def sha256(self) -> str:
        """The hash of the data, training and held-out."""
        hashes = dict.fromkeys((self.train.sha256, self.test.sha256))
        return "+".join(hashes)


def rows_of_run(config: RunConfig) -> RunRows:
    """Read a run's data and divide it; the division depends on the rows alone, not on the seed.

    Held-out data of its own serves both measurements, read as the training rows are; what is worth
    knowing of it stands in their notes. Where a part of the split is empty, the other held-out part
    takes its place; both may be empty.
    """
    task = TASKS[config.task]
    train = task.read(raw_rows(config, config.data), config, config.split_by)
    if config.eval_data is None:
        train, validation, test = split(train, config.split)
        return RunRows(train, validation or test, test or validation)
    held_out = task.read_held_out(raw_rows(config, config.eval_data), config, train)
    check_alike(train, held_out)
    notes = [*train.notes, *notes_on_held_out(train, held_out)]
    return RunRows(replace(train, notes=notes), held_out, held_out)


def read(config: RunConfig, source: str) -> Rows:
    return TASKS[config.task].read(raw_rows(config, source), config, None)


def raw_rows(config: RunConfig, source: str) -> list[RawRow]:
    """Read one source's rows as they stand, without images where the task sees none."""
    raw = read_rows(source)[: config.max_rows]
    check_no_images(TASKS[config.task], raw, {key: getattr(config, key, None) for key in COLUMNS})
    return list(raw)


def check_no_images(task: Task, raw: Sequence[RawRow], columns: Mapping[str, Any]) -> None:
    """Raise when rows have images and their task reads text alone."""
    if task.sees_images:
        return
    seeing = [name for name, other in TASKS.items() if other.sees_images]
    for row in raw:
        if hold_images(row, **columns):
            raise DataError(
                f"{row.where}: the row has an image, and the task {task.name!r} reads text alone; "
                f"take the images out, or train by a task that sees them ({', '.join(seeing)})"
            )


def check_alike(train: Rows, held_out: Rows) -> None:
    check_both("images", (train, train.pictured), (held_out, held_out.pictured))


def check_both(what: str, *parts: tuple[Rows, bool]) -> None:
    """Raise when only one of two parts has something."""
    (train, one), (held_out, other) = parts
    if one != other:
        has, lacks = (train, held_out) if one else (held_out, train)
        raise DataError(
            f"the rows of {has.source} have {what} and those of {lacks.source} have none; "
            "both must be of one kind"
        )


def check_image_keys(config: RunConfig) -> None:
    for key in RunWithImages.model_fields.keys() - RunConfig.model_fields.keys():
        if getattr(config, key, None) not in (None, False, "auto"):
            raise UsageError(
                f"{key!r} applies to rows with images, and these have none; take it out"
            )


def notes_on_held_out(train: Rows, held_out: Rows) -> list[str]:
    known = set(map(content, train.rows))
    seen = [
        line
        for row, line in zip(held_out.rows, held_out.lines, strict=True)
        if content(row) in known
    ]
    notes = list(held_out.notes)
    if held_out.skipped:
        notes.append(counted(held_out.skipped, f"of {held_out.source} left out: a field is empty"))
    if seen:
        what = f"of {held_out.source} are training rows, too, so that nothing new is measured on"
        notes.append(counted(seen, what))
    return notes


def counted(lines: Sequence[int], what: str) -> str:
    return f"{len(lines)} rows {what} (lines {first_lines(lines)})"


def sample(rows: Rows, count: int) -> Rows:
    """Return at most that many rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows.take([i * len(rows) // count for i in range(count)])


def reader_for(folder: Path, pictured: bool, max_pixels: int | None = None) -> Reader:
    """Return what writes rows as tokens: the tokenizer in a model's folder, or the processor.

    Conversations are written by TRL's version of the chat template, which marks the assistant's
    words, where TRL has one.
    """
    if pictured:
        from inlay.data.image_reader import image_reader

        return image_reader(folder, max_pixels)
    from inlay.data.text_reader import TextReader
    from inlay.model.load.tokenizer import read_tokenizer
    from inlay.train.trl import training_template

    return TextReader(read_tokenizer(folder, trust_remote_code=False), training_template)
