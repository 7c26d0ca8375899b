"""A run on labels: a new head and an adapter below it, by transformers' Trainer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from inlay.data.inputs import InputRow
from inlay.data.labels import check_known, contradicting, labels_of, loose_tags
from inlay.data.rows import Rows
from inlay.evaluate.labels import compare_labels, held_out_labels
from inlay.evaluate.record import ComparisonRecord
from inlay.memory.devices import Device
from inlay.model.load.heads import Head
from inlay.train import planning
from inlay.train.arguments import shared
from inlay.train.head_trainer import HeadTrainer
from inlay.train.labels import Labelling, labelling, rows_to_plan
from inlay.train.rows import RunRows
from inlay.train.running import Running, Tokens
from inlay.train.trainer import HeldOut

CLASSES_SHOWN = 12
USUAL_SPREAD = (0.1, 10.0)
"""Standard deviations of a number at which a new head learns it without being scaled."""


class Stages(Running[InputRow]):
    """A run that trains a model to predict labels."""

    found: Labelling

    @property
    def head(self) -> Head:
        """The head that predicts the training rows' labels."""
        return self.found.head(self.config.seed)

    def look_at(self, rows: RunRows, tokenizer: PreTrainedTokenizerBase) -> None:
        """Learn the classes of the training rows; raise where held-out rows have others."""
        self.found = labelling(self.config, rows.train, tokenizer)
        if self.found.labels.kind != "regression":
            for part in (rows.validation, rows.test):
                check_known(part, self.found.labels.classes)
        self.tell_labels(rows.train)

    def tell_labels(self, rows: Rows) -> None:
        """Tell what is predicted, and how often each class comes."""
        kind = self.found.labels.kind
        if kind == "regression":
            numbers = [row["label"] for row in rows.rows]
            mean, spread = float(np.mean(numbers)), float(np.std(numbers))
            self.note(f"kind regression: mean {mean:.4g}, standard deviation {spread:.4g}")
            if not USUAL_SPREAD[0] <= spread <= USUAL_SPREAD[1] or abs(mean) > USUAL_SPREAD[1]:
                self.note(
                    "a new head starts near 0 and learns numbers of about unit size best: scale "
                    "the labels to mean 0 and standard deviation 1"
                )
            return
        counts = Counter(label for row in rows.rows for label in labels_of(row))
        shown = ", ".join(f"{name} {counts[name]}" for name, _ in counts.most_common(CLASSES_SHOWN))
        more = ", ..." if len(counts) > CLASSES_SHOWN else ""
        self.note(f"kind {kind}: {len(self.found.labels.classes)} classes ({shown}{more})")

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[InputRow]:
        """Return rows as tokens with their labels as numbers."""
        return self.found.encode(rows, tokenizer)

    def check_rows(self, rows: Rows, encoded: list[InputRow]) -> None:
        """Tell of rows that were cut or left out, or that contradict each other."""
        longest = self.found.longest
        if longest < self.config.max_length:
            self.note(f"the model takes rows of {longest} tokens, fewer than max_length")
        pairs = zip(encoded, rows.lines, strict=True)
        self.note_lines([line for row, line in pairs if row.truncated], f"cut at {longest} tokens")
        self.note_lines(rows.skipped, "left out: a field is empty")
        self.note_lines(contradicting(rows), "have the text of an earlier row and another label")
        self.note_lines(loose_tags(rows), "have an I- tag that follows none of its kind")

    def largest(self, encoded: list[InputRow], device: Device) -> planning.Rows:
        """Return the largest batch."""
        multiple = planning.padding_multiple(self.config, device)
        return rows_to_plan(self.config, self.found, encoded, multiple)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[InputRow],
        record: dict[str, Any],
    ) -> HeadTrainer:
        """Return the trainer, nothing trained yet."""
        rate = record["learning_rate"]["value"]
        record["labels"] = {"kind": self.found.labels.kind, "classes": self.found.labels.classes}
        return HeadTrainer(
            model,
            tokenizer,
            tokens.train,
            TrainingArguments(
                **shared(TrainingArguments, self.config, model, self.folder.checkpoints, rate),
                remove_unused_columns=False,
            ),
            self.head,
            held_out=self.held_out(model, tokens.validation),
            **self.watched(),
        )

    def held_out(self, model: PreTrainedModel, rows: list[InputRow]) -> HeldOut | None:
        """Return what measures held-out rows, or None when there are none."""
        if not rows:
            return None
        size = max(self.config.batch_size, 8)
        return lambda: held_out_labels(model, rows, self.found.labels, size)

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[InputRow]
    ) -> ComparisonRecord:
        """Return base and baseline against tuned on the test rows."""
        del tokenizer
        return compare_labels(
            model,
            tokens.test,
            self.found.labels,
            self.found.baseline(tokens.train),
            lines=tokens.test_rows.lines,
            batch_size=max(self.config.batch_size, 8),
        )
