"""The rows of a run: read, checked and divided, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from inlay.data.image_answers import normalise_shown_labelled, normalise_shown_pairs
from inlay.data.image_columns import hold_images
from inlay.data.images import normalise_shown
from inlay.data.labelled import Labelled, encode_labelled
from inlay.data.labels import LABELLED, normalise_labels
from inlay.data.preference import Pair, encode_pairs
from inlay.data.prompts import encode_prompts, normalise_prompts
from inlay.data.read import RawRow, first_row, read_rows
from inlay.data.rows import Rows, first_lines
from inlay.data.similar import normalise_similar
from inlay.data.split import content, split
from inlay.data.tokens import Encoded, encode, own_template
from inlay.errors import DataError, UsageError
from inlay.run.config import RunConfig
from inlay.train import trl
from inlay.train.judge import judge_of
from inlay.train.tasks import IMAGES, TASKS, seeing_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inlay.data.processor import ImageReader

    Reader = PreTrainedTokenizerBase | ImageReader
    """What writes rows as tokens: a tokenizer, or a processor where they have images."""


NOT_SUPERVISED = {"preference": normalise_shown_pairs, "labelled": normalise_shown_labelled}
"""What checks the rows of each kind that has fields of its own."""
NAMED = (
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
        """Of the data, training and held-out."""
        hashes = dict.fromkeys((self.train.sha256, self.test.sha256))
        return "+".join(hashes)


def rows_of_run(config: RunConfig) -> RunRows:
    """Read a run's data and divide it; the division depends on the rows alone, not on the seed.

    Held-out data of its own serves both measurements, read as the training rows are; what is worth
    knowing of it stands in their notes. Where a part of the split is empty, the other held-out part
    takes its place; both may be empty.

    Raises:
        DataError: the data are not there, malformed or empty, or a row lacks what it needs.
    """
    if config.eval_data is not None:
        train = read(config, config.data, group=config.split_by)
        held_out = read(like(config, train), config.eval_data, group=None)
        check_alike(train, held_out)
        notes = [*train.notes, *of_held_out(train, held_out)]
        return RunRows(replace(train, notes=notes), held_out, held_out)
    train, validation, test = split(read(config, config.data, config.split_by), config.split)
    return RunRows(train, validation or test, test or validation)


def like(config: RunConfig, train: Rows) -> RunConfig:
    """Return the run with the kind of label that its training rows have."""
    kind = LABELLED.get(train.kind)
    return config if kind is None else config.model_copy(update={"kind": kind})


def of_held_out(train: Rows, held_out: Rows) -> list[str]:
    """Return what is worth knowing of held-out data: rows left out, and rows trained on, too."""
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
    """Return how many rows something holds of, and the first of their lines."""
    return f"{len(lines)} rows {what} (lines {first_lines(lines)})"


def read(config: RunConfig, source: str, group: str | None) -> Rows:
    """Read one source as the run says."""
    raw = read_rows(source)[: config.max_rows]
    check_unseen(config.task, raw, {key: getattr(config, key) for key in NAMED})
    check = NOT_SUPERVISED.get(TASKS[config.task].rows)
    if check is not None:
        known = config.split_by if config.split_by in raw[0].values else None
        urls = bool(config.allow_urls)
        return check(raw, group=group or known, skip_empty=config.skip_empty, allow_urls=urls)
    if TASKS[config.task].rows == "labels":
        return normalise_labels(
            raw,
            kind=config.kind or "auto",
            text=config.text,
            text_pair=config.text_pair,
            label=config.label,
            group=group,
            skip_empty=config.skip_empty,
        )
    if TASKS[config.task].rows == "similar":
        return normalise_similar(
            raw,
            anchor=config.anchor,
            positive=config.positive,
            negative=config.negative,
            score=config.score,
            group=group,
            skip_empty=config.skip_empty,
        )
    if TASKS[config.task].rows == "prompt":
        return normalise_prompts(
            raw,
            prompt=config.prompt,
            needed=judge_of(config.rewards or []).needed,
            group=group,
            skip_empty=config.skip_empty,
        )
    columns = columns_of(config) | {"group": group}
    return normalise_shown(
        raw, allow_urls=bool(config.allow_urls), skip_empty=config.skip_empty, **columns
    )


def columns_of(config: RunConfig) -> dict[str, Any]:
    """Return what a run says of its rows' columns, as `normalise` takes it."""
    return {
        "prompt": config.prompt,
        "completion": config.completion,
        "text": config.text,
        "format": config.format,
        "group": config.split_by,
    }


def have_images(config: RunConfig) -> bool:
    """Say whether a run's rows have images, by the first of them."""
    sees = bool(TASKS[config.task].images)
    return sees and hold_images(first_row(config.data), **columns_of(config))


def check_unseen(task: str, raw: Sequence[RawRow], columns: Mapping[str, Any]) -> None:
    """Raise when rows have images and their task reads text alone.

    Raises:
        DataError: naming the row, the task and those that see.
    """
    if task not in TASKS or TASKS[task].images:
        return
    for row in raw:
        if hold_images(row, **columns):
            raise DataError(
                f"{row.where}: the row has an image, and the task {task!r} reads text alone; take "
                f"the images out, or train by a task that sees them ({', '.join(seeing_tasks())})"
            )


def check_alike(train: Rows, held_out: Rows) -> None:
    """Raise when only one of the rows to train on and the held-out ones have images, or scores."""
    for what, one, other in (
        ("images", train.pictured, held_out.pictured),
        ("scores", *(rows.kind == "scored_pairs" for rows in (train, held_out))),
    ):
        if one != other:
            has, lacks = (train, held_out) if one else (held_out, train)
            raise DataError(
                f"the rows of {has.source} have {what} and those of {lacks.source} have none; "
                "both must be of one kind"
            )


def check_image_keys(config: RunConfig) -> None:
    """Raise for a key that only rows with images know; the run's have none."""
    for key in IMAGES:
        if getattr(config, key) not in (None, False, "auto"):
            raise UsageError(
                f"{key!r} applies to rows with images, and these have none; take it out"
            )


def encode_rows(rows: Rows, reader: Reader, max_length: int) -> list[Encoded]:
    """Return the rows as tokens; conversations by TRL's training template where it has one.

    Of prompts alone no token is trained on; rows with images are written by a model's processor.
    """
    if rows.pictured:
        from inlay.data.vision import encode_images

        return list(encode_images(rows, cast("ImageReader", reader), max_length))
    tokenizer = cast("PreTrainedTokenizerBase", reader)
    if rows.kind == "prompt":
        return encode_prompts(rows, tokenizer, max_length)
    template = training_template(tokenizer) if rows.kind == "messages" else None
    return encode(rows, tokenizer, max_length, chat_template=template)


def encode_pair_rows(rows: Rows, reader: Reader, max_length: int) -> list[Pair]:
    """Return rows of preferences as tokens; conversations by the same template as supervised."""
    if rows.pictured:
        from inlay.data.vision import encode_image_pairs

        return encode_image_pairs(rows, cast("ImageReader", reader), max_length)
    tokenizer = cast("PreTrainedTokenizerBase", reader)
    template = answer_template(rows, tokenizer)
    return encode_pairs(rows, tokenizer, max_length, chat_template=template)


def encode_labelled_rows(rows: Rows, reader: Reader, max_length: int) -> list[Labelled]:
    """Return labelled rows as tokens; conversations by the same template as supervised."""
    if rows.pictured:
        from inlay.data.vision import encode_image_labelled

        return encode_image_labelled(rows, cast("ImageReader", reader), max_length)
    tokenizer = cast("PreTrainedTokenizerBase", reader)
    template = answer_template(rows, tokenizer)
    return encode_labelled(rows, tokenizer, max_length, chat_template=template)


def answer_template(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template for prompts of messages, None for prompts of text."""
    talks = not isinstance(rows.rows[0]["prompt"], str)
    return training_template(tokenizer) if talks else None


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's version of the chat template that marks the assistant's words.

    None when the tokenizer's own does, or when TRL does not know it; the assistant's words are
    then found by what each turn adds.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if own_template(tokenizer) != tokenizer.chat_template:
        return None  # one of several, which TRL does not look among
    try:
        return trl.training_chat_template(tokenizer)
    except ValueError:
        return None


def sample(rows: Rows, count: int) -> Rows:
    """Return at most that many rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows.take([i * len(rows) // count for i in range(count)])
