"""A run on labels: a new head and an adapter below it, by transformers' Trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from inlay.data.inputs import InputRow
from inlay.data.rows import Rows
from inlay.errors import DataError
from inlay.evaluate.comparison import Limits, pace
from inlay.evaluate.outputs import accepted, padded_inputs
from inlay.evaluate.record import ComparisonRecord
from inlay.kernels.loss import IGNORED
from inlay.memory.skeleton import config_of
from inlay.model.fast.padding import length_multiple
from inlay.model.load.heads import SINGLE, Head, head_loss, head_of, labels_in
from inlay.tasks.classify import ClassifyConfig
from inlay.tasks.classify.compare import baseline_of, compare_labels, held_out_labels
from inlay.tasks.classify.metrics import Labels
from inlay.tasks.classify.rows import (
    LABELLED,
    check_known,
    classes_of,
    contradicting,
    labels_of,
    loose_tags,
)
from inlay.tasks.classify.tokens import encode_labels
from inlay.tasks.classify.trainer import HeadTrainer, PadLabelled, columns
from inlay.train.arguments import shared
from inlay.train.collate import Collate
from inlay.train.head_run import HeadRun
from inlay.train.overview import Example
from inlay.train.rows import RunRows, rows_of_run
from inlay.train.task_run import Setup
from inlay.train.trainer import HeldOut

CLASSES_SHOWN = 12
USUAL_SPREAD = (0.1, 10.0)
"""Standard deviations of a number at which a new head learns it without being scaled."""
PROBLEMS: dict[str, Any] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
    "tokens": None,
}
"""The kind of label -> what transformers calls the problem."""


class ClassifyRun(HeadRun[ClassifyConfig, InputRow]):
    """A run that trains a model to predict labels."""

    predicted: Labels | None = None
    """What is predicted; known once the training rows, or a tuned model, are."""
    trained_on: list[InputRow] | None = None
    """The training rows, from which the baseline is made."""

    @property
    def found(self) -> Labels:
        if self.predicted is not None:
            return self.predicted
        kind = "tokens" if self.config.kind == "tokens" else "single"
        return Labels(kind, ("0", "1"))

    @property
    def head(self) -> Head:
        purpose = "tokens" if self.found.kind == "tokens" else "sequence"
        classes = self.found.classes or SINGLE
        return Head(purpose, classes, PROBLEMS[self.found.kind], self.config.seed)

    def learn(self, rows: RunRows) -> None:
        """Learn the classes of the training rows; raise where held-out rows have others.

        The classes stand in the order of a checkpoint that names them.
        """
        kind = LABELLED[rows.train.kind]
        classes = () if kind == "regression" else classes_of(rows.train)
        shape, _ = config_of(self.config.model, self.config.revision)
        named = labels_in(shape)
        of_checkpoint = "Classification" in "".join(shape.architectures or ())
        if classes and of_checkpoint and set(classes) <= set(named):
            classes = named
        self.predicted = Labels(kind, classes)
        if kind != "regression":
            for part in (rows.validation, rows.test):
                check_known(part, classes)
        self.note(self.in_words(rows.train))
        if kind == "regression":
            self.note_unusual_numbers(rows.train)

    def in_words(self, rows: Rows) -> str:
        if self.found.kind == "regression":
            mean, spread = spread_of(rows)
            return f"kind regression: mean {mean:.4g}, standard deviation {spread:.4g}"
        counts = Counter(label for row in rows.rows for label in labels_of(row))
        shown = ", ".join(f"{name} {counts[name]}" for name, _ in counts.most_common(CLASSES_SHOWN))
        more = ", ..." if len(counts) > CLASSES_SHOWN else ""
        return f"kind {self.found.kind}: {len(self.found.classes)} classes ({shown}{more})"

    def note_unusual_numbers(self, rows: Rows) -> None:
        """Tell where numbers are far from what a new head gives at first."""
        mean, spread = spread_of(rows)
        if not USUAL_SPREAD[0] <= spread <= USUAL_SPREAD[1] or abs(mean) > USUAL_SPREAD[1]:
            self.note(
                "a new head starts near 0 and learns numbers of about unit size best: scale "
                "the labels to mean 0 and standard deviation 1"
            )

    def recall(self, model: PreTrainedModel, rows: Rows, record: Mapping[str, Any]) -> None:
        """Take the classes of a tuned model's head."""
        super().recall(model, rows, record)
        head, kind = head_of(model), LABELLED[rows.kind]
        trained = (head.purpose == "tokens", head.problem) if head else None
        if head is None or trained != (kind == "tokens", PROBLEMS[kind]):
            raise DataError(
                f"{rows.source}: the rows are of kind {kind!r}, and the adapter was trained for "
                f"another ({head.problem or head.purpose if head else 'none'}); name it with kind"
            )
        classes = () if kind == "regression" else head.labels
        if classes:
            check_known(rows, classes)
        self.predicted = Labels(kind, classes)

    def encode(self, rows: Rows) -> list[InputRow]:
        return encode_labels(rows, self.tokenizer, self.longest, self.found.classes)

    def check(self, rows: Rows, encoded: list[InputRow]) -> None:
        self.trained_on = encoded
        self.note_shorter_model("rows")
        cut = [line for row, line in zip(encoded, rows.lines, strict=True) if row.truncated]
        self.note_lines(cut, f"cut at {self.longest} tokens")
        self.note_lines(rows.skipped, "left out: a field is empty")
        self.note_lines(contradicting(rows), "have the text of an earlier row and another label")
        self.note_lines(loose_tags(rows), "have an I- tag that follows none of its kind")

    def texts(self, row: InputRow) -> Sequence[InputRow]:
        return [row]

    def kind_of(self, rows: Rows) -> str:
        return self.found.kind

    def labels(self, rows: Rows) -> Iterable[str]:
        return [] if rows.kind == "number" else [x for row in rows.rows for x in labels_of(row)]

    def examples(self, rows: Rows, index: int, row: InputRow) -> list[Example]:
        raw, where = rows.rows[index], rows.where(index)
        if "tags" not in raw:
            return [self.example(where, row, str(raw["label"]))]
        marked = [label != IGNORED for label in row.label]
        return [self.example(where, row, " ".join(raw["tags"]), marked)]

    # A step

    def columns(self, rows: Sequence[InputRow]) -> dict[str, list[Any]]:
        return columns(rows)

    def collator(self, rows: Sequence[InputRow], multiple: int) -> Collate:
        del rows
        return PadLabelled(self.padding, multiple, self.found.kind == "tokens")

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return head_loss(self.head, model(**accepted(model, batch)).logits, batch["labels"])

    def full_row(self) -> InputRow:
        text = self.full_text()
        label: Any = [0] * len(text.input_ids) if self.found.kind == "tokens" else 0
        return replace(text, label=label)

    # Training

    def trainer(self, setup: Setup[InputRow]) -> HeadTrainer:
        model, rows, found = setup.model, setup.tokens.train, self.found
        setup.record["labels"] = {"kind": found.kind, "classes": found.classes}
        rate = setup.learning_rate
        return HeadTrainer(
            model,
            setup.tokenizer,
            self.columns(rows),
            TrainingArguments(
                **shared(TrainingArguments, self.config, model, setup.checkpoints, rate),
                remove_unused_columns=False,
            ),
            self.head,
            collate=self.collator(rows, length_multiple(model)),
            held_out=self.held_out(model, setup.tokens.validation),
            **setup.watched,
        )

    def held_out(self, model: PreTrainedModel, rows: list[InputRow]) -> HeldOut | None:
        if not rows:
            return None
        size = max(self.config.batch_size, 8)
        return lambda: held_out_labels(model, rows, self.found, size)

    # Measuring

    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[InputRow], limits: Limits
    ) -> ComparisonRecord:
        found, known = self.found, self.training_rows()
        baseline = None
        if known is not None:
            baseline = baseline_of([x.label for x in known], found.kind, len(found.classes))
        return compare_labels(model, encoded, found, baseline, lines=rows.lines, **pace(limits))

    def training_rows(self) -> list[InputRow] | None:
        """Return the rows that were trained on; None if the data is gone."""
        if self.trained_on is not None:
            return self.trained_on
        try:
            return self.encode(rows_of_run(self.config).train)
        except DataError:
            return None

    def merge_inputs(self, model: PreTrainedModel, rows: Rows) -> list[dict[str, Tensor]]:
        return [accepted(model, padded_inputs([row], 0, 1)) for row in self.encode(rows)]


def spread_of(rows: Rows) -> tuple[float, float]:
    """Return the mean and the standard deviation of the rows' numbers."""
    numbers = [row["label"] for row in rows.rows]
    return float(np.mean(numbers)), float(np.std(numbers))
