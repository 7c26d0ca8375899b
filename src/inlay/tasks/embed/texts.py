"""Texts that belong together as tokens, and as a batch of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from inlay.data.inputs import InputRow, encode_texts
from inlay.data.rows import Rows
from inlay.errors import DataError
from inlay.evaluate.outputs import padded_inputs
from inlay.tasks.embed.rows import SIMILAR
from inlay.train.collate import Items


@dataclass(frozen=True)
class SimilarRow:
    """The texts of a row as tokens, and how alike the first two are where the row says so."""

    texts: tuple[InputRow, ...]
    score: float | None = None


def encode_similar(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[SimilarRow]:
    """Return the texts of every row as tokens, each cut at the end to `max_length`."""
    names = SIMILAR[rows.kind]
    encoded = [encode_texts([r[name] for r in rows.rows], tokenizer, max_length) for name in names]
    for name, column in zip(names, encoded, strict=True):
        empty = next((i for i, row in enumerate(column) if not row.input_ids), None)
        if empty is not None:
            raise DataError(f"{rows.where(empty)}: {name!r} gives no token; take the row out")
    return [
        SimilarRow(texts, row.get("score"))
        for row, texts in zip(rows.rows, zip(*encoded, strict=True), strict=True)
    ]


@dataclass(frozen=True)
class PadSimilar:
    """Pads each column of texts by itself, and says which texts of a batch are the same."""

    padding: int
    multiple: int

    def __call__(self, rows: Items) -> dict[str, Tensor]:
        """Return `<n>_input_ids`, ... for each column, `same` or the `score`."""
        found = [as_row(row) for row in rows]
        columns = list(zip(*(row.texts for row in found), strict=True))
        batch = {
            f"{number}_{name}": x
            for number, column in enumerate(columns)
            for name, x in padded_inputs(column, self.padding, self.multiple).items()
        }
        if found[0].score is not None:
            return {**batch, "score": torch.tensor([row.score for row in found])}
        return {**batch, "same": same_texts(columns)}


def as_row(values: Mapping[str, Any]) -> SimilarRow:
    types = values["types"] or [None] * len(values["texts"])
    pairs = zip(values["texts"], types, strict=True)
    texts = tuple(InputRow(ids, len(ids), types=types) for ids, types in pairs)
    return SimilarRow(texts, values["score"])


def same_texts(columns: Sequence[Sequence[InputRow]]) -> Tensor:
    """Return (rows, rows * other columns): whether a text is no negative of a row.

    It is its own positive's text in another row, or belongs to an equal anchor.
    """
    anchors, positives = (
        [tuple(row.input_ids) for row in column] for column in (columns[0], columns[1])
    )
    others = [tuple(row.input_ids) for column in columns[1:] for row in column]
    found = torch.tensor([[other == mine for other in others] for mine in positives])
    equal = torch.tensor([[other == mine for other in anchors] for mine in anchors])
    found[:, : len(anchors)] |= equal
    return found & ~torch.eye(len(anchors), len(others), dtype=torch.bool)


def columns_in(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    numbers = sorted({int(n.split("_")[0]) for n in batch if n[0].isdigit()})
    return [
        {n.removeprefix(f"{i}_"): x for n, x in batch.items() if n.startswith(f"{i}_")}
        for i in numbers
    ]
