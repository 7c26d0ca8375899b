"""Rows with labels as a run reads, encodes, plans and measures them; the verbs do so too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.inputs import InputRow, encode_labels
from inlay.data.labels import LABELLED, check_known, classes_of, labels_of
from inlay.data.rows import Rows
from inlay.errors import DataError
from inlay.evaluate.label_metrics import Labels
from inlay.evaluate.labels import baseline_of, compare_labels
from inlay.evaluate.outputs import accepted, padded_inputs
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.run import Told
from inlay.kernels.loss import IGNORED
from inlay.memory.devices import Device
from inlay.memory.skeleton import config_of
from inlay.model.load.heads import SINGLE, Head, head_loss, head_of, labels_in
from inlay.run.config import RunConfig
from inlay.train import planning
from inlay.train.head_planning import Planned, full_row, longest_row, reader
from inlay.train.head_trainer import PadLabelled
from inlay.train.overview import Example, Reading, example_of
from inlay.train.rows import rows_of_run

PROBLEMS: dict[str, Any] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
    "tokens": None,
}
"""The kind of label -> what transformers calls the problem."""


@dataclass(frozen=True)
class Labelling:
    """What a run predicts, and how long a row may be."""

    labels: Labels
    longest: int

    def head(self, seed: int) -> Head:
        """Return the head that predicts it."""
        kind = self.labels.kind
        purpose = "tokens" if kind == "tokens" else "sequence"
        return Head(purpose, self.labels.classes or SINGLE, PROBLEMS[kind], seed)

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[InputRow]:
        """Return rows as tokens with their labels as numbers."""
        return encode_labels(rows, tokenizer, self.longest, self.labels.classes)

    def baseline(self, rows: Sequence[InputRow]) -> Tensor:
        """Return the constant output that fits training rows best."""
        kind, classes = self.labels.kind, len(self.labels.classes)
        return baseline_of([row.label for row in rows], kind, classes)


def labelling(config: RunConfig, train: Rows, tokenizer: PreTrainedTokenizerBase) -> Labelling:
    """Return what training rows predict; classes in the order of a checkpoint that names them.

    Raises:
        DataError: there is one class only.
    """
    kind = LABELLED[train.kind]
    classes = () if kind == "regression" else classes_of(train)
    shape, _ = config_of(config.model, config.revision)
    named = labels_in(shape)
    of_checkpoint = "Classification" in "".join(shape.architectures or ())
    if classes and of_checkpoint and set(classes) <= set(named):
        classes = named
    return Labelling(Labels(kind, classes), longest_row(config, tokenizer))


# The plan


def rows_to_plan(
    config: RunConfig, found: Labelling, encoded: Sequence[InputRow], multiple: int
) -> planning.Rows:
    """Return the largest batch that the run's order yields, and how much data there is."""
    lengths = [len(row.input_ids) for row in encoded]
    chosen = [encoded[i] for i in planning.largest_batch(config, lengths)]
    head = found.head(config.seed)
    batch = PadLabelled(0, multiple, head.purpose == "tokens")(chosen)
    return planning.Rows(
        batch, len(encoded), sum(lengths), len(encoded), step=partial(step_loss, head), head=head
    )


def step_loss(head: Head, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of a batch, as `HeadTrainer` computes it."""
    return head_loss(head, model(**accepted(model, batch)).logits, batch["labels"])


def row_reader(
    config: RunConfig, device: Device, has_data: bool
) -> Callable[[RunConfig], planning.Rows]:
    """Return what works out a run's largest batch; without data, of full length and two classes."""

    def prepare(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Planned:
        found = labelling(config, rows, tokenizer)
        encoded = found.encode(rows, tokenizer)
        return lambda changed, multiple: rows_to_plan(changed, found, encoded, multiple)

    return reader(config, device, prepare if has_data else None, assumed_rows)


def assumed_rows(config: RunConfig) -> planning.Rows:
    """Return a batch of rows as long as the run and the model allow."""
    row = full_row(config)
    kind = "tokens" if config.kind == "tokens" else "single"
    label: Any = [0] * len(row.input_ids) if kind == "tokens" else 0
    found = Labelling(Labels(kind, ("0", "1")), len(row.input_ids))
    rows = [replace(row, label=label)] * config.batch_size
    planned = rows_to_plan(config, found, rows, 1)
    return replace(planned, count=0, tokens=0, trained_tokens=0, assumed=True)


# What `inlay data` shows


def reading(
    config: RunConfig, train: Rows, tokenizer: PreTrainedTokenizerBase
) -> Reading[InputRow]:
    """Return how rows with labels are read and shown."""
    found = labelling(config, train, tokenizer)

    def encode(part: Rows) -> list[InputRow]:
        if found.labels.classes:
            check_known(part, found.labels.classes)
        return found.encode(part, tokenizer)

    def examples(index: int, row: InputRow) -> list[Example]:
        raw, where = train.rows[index], train.where(index)
        if "tags" not in raw:
            return [example_of(where, row, tokenizer, str(raw["label"]))]
        marked = [label != IGNORED for label in row.label]
        return [example_of(where, row, tokenizer, " ".join(raw["tags"]), marked)]

    kind, longest = found.labels.kind, found.longest
    return Reading(kind, longest, encode, lambda row: [row], examples, shown_labels)


def shown_labels(rows: Rows) -> list[str]:
    """Return every class that the rows name, as often as they do; nothing of numbers."""
    return [] if rows.kind == "number" else [x for row in rows.rows for x in labels_of(row)]


# Measuring an adapter by itself


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    config: RunConfig,
    **told: Unpack[Told],
) -> ComparisonRecord:
    """Return base against tuned on rows, and the run's baseline where its rows are still there.

    Raises:
        DataError: a row has a label that the model does not know.
        ModelError: the model has no head for labels.
    """
    found = labelling_of(model, rows, config, tokenizer)
    encoded = found.encode(rows, tokenizer)
    return compare_labels(
        model,
        encoded,
        found.labels,
        known_baseline(config, found, tokenizer),
        lines=rows.lines,
        **told,
    )


def labelling_of(
    model: PreTrainedModel, rows: Rows, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> Labelling:
    """Return what a model predicts of rows.

    Raises:
        DataError: the rows' labels are not of the model's kind, or unknown to it.
    """
    head, kind = head_of(model), LABELLED[rows.kind]
    wanted = (head.purpose == "tokens", head.problem) if head else None
    if wanted != (kind == "tokens", PROBLEMS[kind]):
        raise DataError(
            f"{rows.source}: the rows are of kind {kind!r}, and the adapter was trained for "
            f"another ({head.problem or head.purpose if head else 'none'}); name it with kind"
        )
    assert head is not None
    classes = () if kind == "regression" else head.labels
    if classes:
        check_known(rows, classes)
    return Labelling(Labels(kind, classes), longest_row(config, tokenizer))


def inputs_of(
    model: PreTrainedModel, rows: Rows, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> list[dict[str, Tensor]]:
    """Return each row as a batch of its own, labels left out."""
    encoded = labelling_of(model, rows, config, tokenizer).encode(rows, tokenizer)
    return [accepted(model, padded_inputs([row], 0, 1)) for row in encoded]


def known_baseline(
    config: RunConfig, found: Labelling, tokenizer: PreTrainedTokenizerBase
) -> Tensor | None:
    """Return the baseline of the run's training rows; None where they are not there any more."""
    try:
        return found.baseline(found.encode(rows_of_run(config).train, tokenizer))
    except DataError:
        return None
