"""How well a model with a head predicts labels: base, tuned, and what knows the labels' share only.

The base's head is untrained, so that base against tuned says whether training did anything; what a
tuned model is worth shows against the baseline, which gives every row the training rows' majority
class (or their mean) and that class's share as its probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inlay.data.inputs import InputRow
from inlay.errors import DataError
from inlay.evaluate.comparison import UNTRAINED, Stage, named
from inlay.evaluate.outputs import outputs
from inlay.evaluate.record import (
    ClassRecord,
    ComparisonRecord,
    MetricComparison,
    compared_means,
    compared_statistic,
)
from inlay.evaluate.statistics import LEVEL
from inlay.kernels.loss import IGNORED
from inlay.model.adapters.attach import disabled
from inlay.tasks.classify.metrics import LabelKind, Labels, Metric, metrics, of_words


def compare_labels(
    model: nn.Module,
    rows: Sequence[InputRow],
    labels: Labels,
    baseline: Tensor | None,
    *,
    lines: Sequence[int] | None = None,
    batch_size: int = 8,
    on_progress: Stage | None = None,
) -> ComparisonRecord:
    """Measure the model with its active adapters, without, and the baseline on the same rows.

    Args:
        model: a model with a head and an adapter on it.
        rows: the held-out rows as tokens, with their labels.
        labels: what is predicted.
        baseline: what `baseline_of` returned for the training rows; None where they are not known.
        lines: the rows' lines in their file, for error messages.
        batch_size: rows in one forward pass.
        on_progress: called as the work goes on.
    """
    if not rows:
        raise DataError("there are no held-out rows; give more rows or another split")

    def given(who: str) -> list[Tensor]:
        told = named(who, on_progress)
        progress = told and (lambda done, total: told("predictions", done, total))
        return outputs(model, rows, batch_size, lines=lines, on_progress=progress)

    expected = [row.label for row in rows]
    tuned_outputs = given("tuned")
    with disabled(model):
        base = metrics(given("base"), expected, labels)
    tuned = metrics(tuned_outputs, expected, labels)
    found: ComparisonRecord = {
        "rows": len(rows),
        "tokens": sum(len(row.input_ids) for row in rows),
        "counted": "tokens",
        "generated_rows": 0,
        "level": LEVEL,
        "metrics": compared(base, tuned),
        "examples": [],
        "note": UNTRAINED,
        "classes": class_records(tuned_outputs, expected, labels),
    }
    if labels.kind == "single":
        found["confusion"] = confusion(tuned_outputs, expected, len(labels.classes))
    if baseline is not None:
        constant = metrics(repeated(baseline, rows, labels.kind), expected, labels)
        found["baseline"] = {
            "about": about(baseline, labels),
            "metrics": compared(constant, tuned),
        }
    return found


def compared(first: Sequence[Metric], second: Sequence[Metric]) -> list[MetricComparison]:
    """Return the record of every metric that both have, with the paired test of the difference."""
    others = {metric.name: metric for metric in second}
    pairs = [(metric, others[metric.name]) for metric in first if metric.name in others]
    return [
        compared_means(a.name, a.better, a.rows.tolist(), b.rows.tolist())
        if a.statistic is None
        else compared_statistic(a.name, a.better, a.statistic, a.rows.tolist(), b.rows.tolist())
        for a, b in pairs
    ]


def held_out_labels(
    model: nn.Module, rows: Sequence[InputRow], labels: Labels, batch_size: int
) -> dict[str, float]:
    """Return the metrics of the model as it is, its loss included."""
    found = metrics(outputs(model, rows, batch_size), [row.label for row in rows], labels)
    values = {metric.name: metric.value for metric in found}
    if labels.kind == "regression":
        values["loss"] = values["rmse"] ** 2
    return values


# The baseline


def baseline_of(labels: Sequence[Any], kind: LabelKind, classes: int) -> Tensor:
    """Return the constant output that fits training labels best: shares of classes, or the mean.

    A class's share is (count + 1) / (labels + classes), so that none is impossible.
    """
    if kind == "regression":
        return torch.tensor([float(np.mean(labels))])
    if kind == "multi":
        share = (torch.tensor(labels).sum(0) + 1) / (len(labels) + 2)
        return share.logit()
    flat = [x for label in labels for x in label if x != IGNORED] if kind == "tokens" else labels
    counts = torch.tensor(list(flat)).bincount(minlength=classes).float()
    return ((counts + 1) / (counts.sum() + classes)).log()


def repeated(constant: Tensor, rows: Sequence[InputRow], kind: LabelKind) -> list[Tensor]:
    if kind == "tokens":
        return [constant.expand(len(row.input_ids), -1) for row in rows]
    return [constant for _ in rows]


def about(constant: Tensor, labels: Labels) -> str:
    """Say what the baseline answers."""
    if labels.kind == "regression":
        return f"the training rows' mean, {float(constant):.4g}"
    if labels.kind == "multi":
        often = [c for c, logit in zip(labels.classes, constant.tolist(), strict=True) if logit > 0]
        return f"the classes of more than half the training rows ({', '.join(often) or 'none'})"
    what = "tag" if labels.kind == "tokens" else "class"
    return f"the training rows' most frequent {what}, {labels.classes[int(constant.argmax())]!r}"


# The tuned model, class by class


def class_records(
    given: Sequence[Tensor], expected: Sequence[Any], labels: Labels
) -> list[ClassRecord]:
    """Return precision, recall and F1 of every class; of tags, of every kind of entity."""
    if labels.kind == "regression":
        return []
    if labels.kind == "multi":
        chosen = torch.stack(list(given)) > 0
        right = torch.tensor(expected).bool()
        return [
            class_record(name, right[:, i].tolist(), chosen[:, i].tolist())
            for i, name in enumerate(labels.classes)
        ]
    if labels.kind == "single":
        chosen = torch.stack(list(given)).argmax(-1)
        right = torch.tensor(expected)
    else:
        words = [of_words(logits, label) for logits, label in zip(given, expected, strict=True)]
        right, chosen = (torch.cat([word[i] for word in words]) for i in (0, 1))
    return [
        class_record(name, (right == i).tolist(), (chosen == i).tolist())
        for i, name in enumerate(labels.classes)
    ]


def class_record(name: str, there: Sequence[bool], predicted: Sequence[bool]) -> ClassRecord:
    """Return one class's record; a share of nothing is None."""
    hits = sum(a and b for a, b in zip(there, predicted, strict=True))
    rows, given = sum(there), sum(predicted)
    return {
        "label": name,
        "rows": rows,
        "precision": hits / given if given else None,
        "recall": hits / rows if rows else None,
        "f1": 2 * hits / (rows + given) if rows + given else None,
    }


def confusion(given: Sequence[Tensor], expected: Sequence[Any], classes: int) -> list[list[int]]:
    """Return how many rows of each class (matrix row) were predicted as each class (column)."""
    chosen = torch.stack(list(given)).argmax(-1)
    flat = torch.tensor(expected) * classes + chosen
    return flat.bincount(minlength=classes * classes).view(classes, classes).tolist()
