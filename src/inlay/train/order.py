"""The order of the training rows: a function of the seed and the epoch, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

BATCHES_SORTED_TOGETHER = 32
"""Rows are shuffled, and only this many batches at a time are sorted by length."""


Arrange = Callable[[Sequence[int], int, int, int], list[int]]
"""Returns an epoch's row numbers from the rows' lengths, the batch size, the seed and the epoch."""


class TrainingOrder(Sampler[int]):
    """Yield every row once an epoch, in batches of similar length, the batches in random order."""

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, arrange: Arrange | None = None
    ) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.arrange = arrange or order
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to yield; a resumed run starts within one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.arrange(self.lengths, self.batch_size, self.seed, self.epoch))


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


def kept_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Return the row numbers of an epoch whose batches are those of every other epoch.

    Rows of all lengths stand in a batch, drawn once, and the batches are mixed; a last, smaller
    batch stays last.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(lengths) // batch_size
    generator.manual_seed(seed * 1_000_003 + epoch)
    mixed: list[int] = torch.randperm(whole, generator=generator).tolist()
    kept = [row for n in mixed for row in drawn[n * batch_size : (n + 1) * batch_size]]
    return kept + drawn[whole * batch_size :]


def neighbours(ordered: Sequence[int], batch_size: int) -> dict[int, int]:
    """Return which row comes before each row in its batch; before the first, the batch's last.

    Alone in the last batch, a row comes after the one of the batch before.
    """
    found: dict[int, int] = {}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        last = batch[-1] if len(batch) > 1 else ordered[start - 1]
        found |= dict(zip(batch, [last, *batch[:-1]], strict=True))
    return found
