"""How well embeddings bring together what belongs together: base against tuned on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from inlay.data.rows import Rows
from inlay.errors import DataError
from inlay.evaluate.comparison import Stage, named
from inlay.evaluate.record import (
    ComparisonRecord,
    MetricComparison,
    compared_means,
    compared_statistic,
)
from inlay.evaluate.statistics import LEVEL, pearson, spearman
from inlay.model.adapters.attach import disabled
from inlay.tasks.embed.embedder import Embedder
from inlay.tasks.embed.texts import SimilarRow

AMONG = (1, 5, 10)
"""How many of the nearest texts a recall looks at."""


@dataclass(frozen=True)
class Candidates:
    """The different texts that anchors are to find among, and which of them each is to find."""

    first: list[int]
    """The row that each candidate stands in."""
    relevant: list[set[int]]
    """Of each row, the candidates that belong to its anchor."""

    @classmethod
    def of(cls, anchors: Sequence[str], positives: Sequence[str]) -> Candidates:
        """Return the different positives; one that belongs to equal anchors belongs to both."""
        place: dict[str, int] = {}
        first: list[int] = []
        wanted: dict[str, set[int]] = {}
        for row, (anchor, positive) in enumerate(zip(anchors, positives, strict=True)):
            if positive not in place:
                place[positive] = len(first)
                first.append(row)
            wanted.setdefault(anchor, set()).add(place[positive])
        return cls(first, [wanted[anchor] for anchor in anchors])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines (n, m) of rows (n, width) and (m, width)."""
    return F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).T


def ranks(anchors: Tensor, positives: Tensor, candidates: Candidates) -> list[int]:
    """Return where, counted from 1, the nearest text that belongs to each anchor stands."""
    near = cosine(anchors, positives[candidates.first])
    found: list[int] = []
    for row, relevant in zip(near, candidates.relevant, strict=True):
        best = row[sorted(relevant)].max()
        others = torch.ones(len(row), dtype=torch.bool)
        others[sorted(relevant)] = False
        found.append(1 + int((row[others] >= best).sum()))
    return found


def compared_retrieval(
    base: Sequence[Tensor], tuned: Sequence[Tensor], candidates: Candidates
) -> list[MetricComparison]:
    """Return recall among the nearest 1, 5 and 10, the mean reciprocal rank, and triplets right.

    Args:
        base: embeddings of anchors, positives and, of triplets, negatives, each (rows, width).
        tuned: the same of the tuned model.
        candidates: what is searched among.
    """
    places = [ranks(side[0], side[1], candidates) for side in (base, tuned)]
    among = [k for k in AMONG if k == 1 or k < len(candidates.first)]
    found = [
        compared_means(
            f"recall_at_{k}", "higher", *([float(r <= k) for r in side] for side in places)
        )
        for k in among
    ]
    found.append(compared_means("mrr", "higher", *([1 / r for r in side] for side in places)))
    if len(base) == 3:
        sides = [triplets_right(*side) for side in (base, tuned)]
        found.append(compared_means("triplet_accuracy", "higher", *sides))
    return found


def triplets_right(anchors: Tensor, positives: Tensor, negatives: Tensor) -> list[float]:
    """Return 1 for each anchor nearer to its positive than to its negative, else 0."""
    near, far = (F.cosine_similarity(anchors, other) for other in (positives, negatives))
    return (near > far).double().tolist()


def compared_scores(
    base: Sequence[Tensor], tuned: Sequence[Tensor], scores: Sequence[float]
) -> list[MetricComparison]:
    """Return the correlations of cosine and score, by rank and by value."""
    before, after = (scored(scores, side) for side in (base, tuned))
    return [
        compared_statistic("spearman", "higher", spearman, before, after),
        compared_statistic("pearson", "higher", pearson, before, after),
    ]


def scored(scores: Sequence[float], texts: Sequence[Tensor]) -> list[list[float]]:
    cosines: list[float] = F.cosine_similarity(texts[0], texts[1]).tolist()
    return [[score, cosine] for score, cosine in zip(scores, cosines, strict=True)]


def compare_similar(
    model: PreTrainedModel,
    whole: Embedder,
    rows: Rows,
    encoded: Sequence[SimilarRow],
    batch_size: int,
    on_progress: Stage | None = None,
) -> ComparisonRecord:
    """Measure the embeddings with the model's active adapters, and without, on the same rows."""
    if not encoded:
        raise DataError("there are no held-out rows; give more rows or another split")
    tuned = vectors_of(whole, encoded, batch_size, named("tuned", on_progress))
    with disabled(model):
        base = vectors_of(whole, encoded, batch_size, named("base", on_progress))
    if rows.kind == "scored_pairs":
        metrics = compared_scores(base, tuned, [row["score"] for row in rows.rows])
    else:
        metrics = compared_retrieval(base, tuned, candidates_of(rows))
    return {
        "rows": len(encoded),
        "tokens": sum(len(text.input_ids) for row in encoded for text in row.texts),
        "counted": "tokens",
        "generated_rows": 0,
        "level": LEVEL,
        "metrics": metrics,
        "examples": [],
    }


def candidates_of(rows: Rows) -> Candidates:
    return Candidates.of(*([row[name] for row in rows.rows] for name in ("anchor", "positive")))


def vectors_of(
    whole: Embedder, encoded: Sequence[SimilarRow], batch_size: int, on_progress: Stage | None
) -> list[Tensor]:
    """Return the vectors of every column of texts, each (rows, width)."""
    columns = list(zip(*(row.texts for row in encoded), strict=True))
    flat = [text for column in columns for text in column]
    told = on_progress and (lambda done, total: on_progress("embeddings", done, total))
    return list(whole.embed(flat, batch_size, told).chunk(len(columns)))
