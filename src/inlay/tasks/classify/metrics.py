"""Metrics of predicted labels, row by row, and the statistics of whole sets of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from inlay.evaluate.statistics import Floats, Statistic, pearson, spearman
from inlay.kernels.loss import IGNORED
from inlay.tasks.classify.entities import entities

LabelKind = Literal["single", "multi", "regression", "tokens"]


@dataclass(frozen=True)
class Labels:
    """What is predicted: the kind of label, and the classes in the order of the outputs."""

    kind: LabelKind
    classes: tuple[str, ...]

    @property
    def entities(self) -> bool:
        """Whether the tags mark where an entity begins, so that whole entities can be counted."""
        marked = all(c == "O" or c[:2] in ("B-", "I-") for c in self.classes)
        return self.kind == "tokens" and marked and any(c[:2] == "B-" for c in self.classes)


@dataclass(frozen=True)
class Metric:
    """A metric's values row by row; its `statistic`, where it is not their mean."""

    name: str
    better: Literal["lower", "higher"]
    rows: Floats
    statistic: Statistic | None = None

    @property
    def value(self) -> float:
        return float(self.rows.mean() if self.statistic is None else self.statistic(self.rows))


def metrics(given: Sequence[Tensor], expected: Sequence[Any], labels: Labels) -> list[Metric]:
    return METRICS[labels.kind](given, expected, labels)


def single_metrics(
    given: Sequence[Tensor], expected: Sequence[Any], labels: Labels
) -> list[Metric]:
    """Return the loss in nats, accuracy, and the mean F1 of the classes."""
    log_probs = torch.stack(list(given)).double().log_softmax(-1)
    right = torch.tensor(expected)
    nll = -log_probs.gather(1, right[:, None]).squeeze(1)
    chosen = log_probs.argmax(-1)
    pairs = torch.stack([right, chosen], dim=1).double().numpy()
    return [
        Metric("loss", "lower", nll.numpy()),
        Metric("accuracy", "higher", (chosen == right).double().numpy()),
        Metric("macro_f1", "higher", pairs, macro_f1(len(labels.classes))),
    ]


def multi_metrics(given: Sequence[Tensor], expected: Sequence[Any], labels: Labels) -> list[Metric]:
    """Return the loss in nats a class, rows all right, and F1 over all decisions and by class."""
    logits, right = torch.stack(list(given)).double(), torch.tensor(expected).double()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, right, reduction="none").mean(1)
    chosen = (logits > 0).double()
    exact = (chosen == right).all(1).double()
    both = torch.cat([right, chosen], dim=1).numpy()
    count = len(labels.classes)
    return [
        Metric("loss", "lower", loss.numpy()),
        Metric("exact_labels", "higher", exact.numpy()),
        Metric("micro_f1", "higher", both, lambda rows: many_f1(rows, count, by_class=False)),
        Metric("macro_f1", "higher", both, lambda rows: many_f1(rows, count, by_class=True)),
    ]


def number_metrics(
    given: Sequence[Tensor], expected: Sequence[Any], labels: Labels
) -> list[Metric]:
    """Return root mean square and mean absolute error, and the correlations of a varying output."""
    del labels
    found = torch.stack(list(given)).double().squeeze(-1).numpy()
    right = np.asarray(expected, dtype=np.float64)
    pairs = np.stack([right, found], axis=1)
    errors = [
        Metric("rmse", "lower", pairs, rmse),
        Metric("mae", "lower", np.abs(right - found)),
    ]
    if np.ptp(found) == 0 or np.ptp(right) == 0:
        return errors
    return [
        *errors,
        Metric("pearson", "higher", pairs, pearson),
        Metric("spearman", "higher", pairs, spearman),
    ]


def token_metrics(given: Sequence[Tensor], expected: Sequence[Any], labels: Labels) -> list[Metric]:
    """Return the loss in nats a word, the share of right tags, and F1 of whole entities."""
    losses: list[list[float]] = []
    hits: list[list[float]] = []
    spans: list[list[float]] = []
    for logits, label in zip(given, expected, strict=True):
        right, chosen, nll = of_words(logits, label)
        losses.append([float(nll.sum()), len(right)])
        hits.append([float((right == chosen).sum()), len(right)])
        if labels.entities:
            spans.append(span_counts(right, chosen, labels.classes))
    found = [
        Metric("loss", "lower", np.asarray(losses), ratio),
        Metric("tag_accuracy", "higher", np.asarray(hits), ratio),
    ]
    if labels.entities:
        found.append(Metric("entity_f1", "higher", np.asarray(spans), span_f1))
    return found


METRICS: dict[str, Callable[[Sequence[Tensor], Sequence[Any], Labels], list[Metric]]] = {
    "single": single_metrics,
    "multi": multi_metrics,
    "regression": number_metrics,
    "tokens": token_metrics,
}


def of_words(logits: Tensor, label: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tags of a row's words, those predicted, and the loss of each in nats."""
    right = torch.tensor(label)
    counted = right != IGNORED
    log_probs = logits[counted].double().log_softmax(-1)
    right = right[counted]
    nll = -log_probs.gather(1, right[:, None]).squeeze(1)
    return right, log_probs.argmax(-1), nll


def span_counts(right: Tensor, chosen: Tensor, classes: Sequence[str]) -> list[float]:
    """Return how many entities of a row were found exactly, were predicted, and exist."""
    there, predicted = (
        set(entities([str(classes[int(i)]) for i in tags])) for tags in (right, chosen)
    )
    return [float(len(there & predicted)), float(len(predicted)), float(len(there))]


# Statistics: (..., rows, values) -> (...)


def ratio(rows: Floats) -> Floats:
    """Return sum of the first values / sum of the second."""
    total = rows.sum(axis=-2)
    return total[..., 0] / np.maximum(total[..., 1], 1e-12)


def rmse(rows: Floats) -> Floats:
    """Return sqrt(mean((expected - predicted)^2))."""
    return np.sqrt(((rows[..., 0] - rows[..., 1]) ** 2).mean(axis=-1))


def f1(hits: Floats, predicted: Floats, there: Floats) -> Floats:
    """Return 2 hits / (predicted + there); 0 where there is neither."""
    return 2 * hits / np.maximum(predicted + there, 1e-12)


def span_f1(rows: Floats) -> Floats:
    total = rows.sum(axis=-2)
    return f1(total[..., 0], total[..., 1], total[..., 2])


def macro_f1(classes: int) -> Statistic:
    """Return the mean F1 of the classes that are expected or predicted, from (expected, chosen)."""

    def statistic(rows: Floats) -> Floats:
        sums = np.zeros(rows.shape[:-2])
        seen = np.zeros(rows.shape[:-2])
        for number in range(classes):
            there, predicted = rows[..., 0] == number, rows[..., 1] == number
            counts = [x.sum(axis=-1) for x in (there & predicted, predicted, there)]
            sums += f1(*counts)
            seen += (counts[1] + counts[2]) > 0
        return sums / np.maximum(seen, 1)

    return statistic


def many_f1(rows: Floats, classes: int, *, by_class: bool) -> Floats:
    """Return F1 of yes-or-no decisions, over all of them or as the mean of the classes'."""
    there, predicted = rows[..., :classes], rows[..., classes:]
    counts = [x.sum(axis=-2) for x in (there * predicted, predicted, there)]
    if not by_class:
        return f1(*(x.sum(axis=-1) for x in counts))
    seen = (counts[1] + counts[2]) > 0
    return (f1(*counts) * seen).sum(axis=-1) / np.maximum(seen.sum(axis=-1), 1)
