"""Rows of tokens with their labels as one batch: padded, or one after another in one sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.data.padding import pad
from inlay.data.tokens import Encoded
from inlay.evaluate.losses import PADDING
from inlay.kernels.loss import IGNORED
from inlay.model.fast.packing import positions

Items = Sequence[Mapping[str, Any]]
"""Rows as a trainer's data set holds them."""
Collate = Callable[[Items], dict[str, Any]]
"""Makes one batch of rows."""


def items_of(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def labels(row: Encoded) -> list[int]:
    pairs = zip(row.input_ids, row.trained, strict=True)
    return [token if trained else IGNORED for token, trained in pairs]


@dataclass(frozen=True)
class Padded:
    """Pads rows on the right to the longest, rounded up to a multiple."""

    multiple: int

    def __call__(self, rows: Items) -> dict[str, Tensor]:
        """Return input_ids, labels and attention_mask, each (rows, longest)."""
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": pad(ids, PADDING, self.multiple),
            "labels": pad([row["labels"] for row in rows], IGNORED, self.multiple),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, self.multiple),
        }


@dataclass(frozen=True)
class Concatenated:
    """Joins rows into one of batch 1; attention tells them apart by positions from 0 on.

    No row's first token is a label, for the token before it belongs to another row. A last row
    of padding, without labels, fills the sequence to a multiple of `multiple` tokens.
    """

    multiple: int

    def __call__(self, rows: Items) -> dict[str, Tensor]:
        """Return input_ids, labels and position_ids, each (1, tokens), and the padding's size."""
        lengths = [len(row["input_ids"]) for row in rows]
        filled = -sum(lengths) % self.multiple
        ids = [token for row in rows for token in row["input_ids"]] + [PADDING] * filled
        labels = [label for row in rows for label in [IGNORED, *row["labels"][1:]]]
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels + [IGNORED] * filled]),
            "position_ids": positions([*lengths, filled]),
            "padding": torch.tensor(filled),
        }


@dataclass(frozen=True)
class WithImages:
    """Adds to a batch of tokens what the model sees of its rows, which are found by number."""

    collate: Collate
    seen: Callable[[Sequence[int], dict[str, Any]], dict[str, Any]]
    """(the rows' numbers, their batch) -> the further inputs."""

    def __call__(self, rows: Items) -> dict[str, Any]:
        batch = self.collate(rows)
        return {**batch, **self.seen([row["row"] for row in rows], batch)}
