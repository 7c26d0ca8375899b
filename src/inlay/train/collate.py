"""A microbatch without padding: its rows one after another in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.evaluate.losses import PADDING
from inlay.kernels.loss import IGNORED
from inlay.model.fast.packing import positions


@dataclass(frozen=True)
class Concatenate:
    """Joins rows into one of batch 1; attention tells them apart by positions from 0 on.

    No row's first token is a label, for the token before it belongs to another row. A last row
    of padding, without labels, fills the sequence to a multiple of `multiple` tokens.
    """

    multiple: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
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
