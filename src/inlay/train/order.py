"""The order of the training rows: a function of the seed and the epoch, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

BATCHES_SORTED_TOGETHER = 32
"""Rows are shuffled, and only this many batches at a time are sorted by length."""


class TrainingOrder(Sampler[int]):
    """Yield every row once an epoch, in batches of similar length, the batches in random order."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to yield; a resumed run starts in the middle of one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(order(self.lengths, self.batch_size, self.seed, self.epoch))


def order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Return the row numbers of an epoch; a last, smaller batch stays last."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(lengths) - len(lengths) % batch_size
    span = BATCHES_SORTED_TOGETHER * batch_size
    batches: list[list[int]] = []
    for start in range(0, whole, span):
        rows = sorted(shuffled[start : min(start + span, whole)], key=lambda i: lengths[i])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    mixed: list[int] = torch.randperm(len(batches), generator=generator).tolist()
    return [row for number in mixed for row in batches[number]] + shuffled[whole:]
