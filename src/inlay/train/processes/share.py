"""Which rows of a step each process runs, so that their sum is the step one process would take.

A step of one process is `gradient_accumulation` passes of `batch_size` rows. Several processes
take the same rows in the same passes, or in equal parts of passes, and add their gradients: a run
file means the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.utils.data import Sampler

from inlay.train.order import Arrange, TrainingOrder, order
from inlay.train.processes.launch import check_divisible
from inlay.train.processes.world import ALONE, World


class Part(NamedTuple):
    """Rows [start, stop) of a step, and how much their mean counts in the step's mean."""

    start: int
    stop: int
    weight: float
    first: int = 0
    """The pass that they are part of has the rows [first, last) of the step."""
    last: int = 0

    @property
    def pass_weight(self) -> float:
        """How much the mean of the whole pass counts; nothing where its part counts nothing."""
        return self.weight * (self.last - self.first) / (self.stop - self.start)


WHOLE = Part(0, 1, 1.0, 0, 1)
"""The only part of a pass in a process that is alone."""


@dataclass(frozen=True)
class Share:
    """One process's part of every step."""

    rows: int
    """Rows of a pass in one process, the run's `batch_size`."""
    accumulation: int
    """Passes of a step in one process."""
    world: World = ALONE

    @property
    def cuts(self) -> int:
        """The number of equal parts of a pass, so that every process has equally many."""
        return next(
            cuts
            for cuts in range(1, self.rows + 1)
            if self.rows % cuts == 0 and self.accumulation * cuts % self.world.size == 0
        )

    @property
    def pass_rows(self) -> int:
        """Rows of a pass in this process."""
        return self.rows // self.cuts

    @property
    def passes(self) -> int:
        """Passes of this process to a step."""
        return self.accumulation * self.cuts // self.world.size

    @property
    def step_rows(self) -> int:
        """Rows of a step, all processes together."""
        return self.rows * self.accumulation

    def parts(self, rows: int) -> list[Part]:
        """Return this process's parts of a step of that many rows; every process has as many.

        Where parts run out, as they may in an epoch's last step, one that counts nothing is run.
        """
        whole = ranges(0, rows, self.rows)
        every = [
            Part(start, stop, (stop - start) / (last - first) / len(whole), first, last)
            for first, last in whole
            for start, stop in ranges(first, last, self.pass_rows)
        ]
        spare = every[0]._replace(weight=0.0)
        every += [spare] * (-len(every) % self.world.size)
        return every[self.world.rank :: self.world.size]

    @property
    def companions(self) -> range:
        """The processes that run parts of one pass at the same time, this one among them."""
        first = self.world.rank // self.cuts * self.cuts
        return range(first, first + self.cuts)

    def seed_of(self, seed: int, step: int, number: int) -> int:
        part = number * self.world.size + self.world.rank
        return seed * 1_000_003 + step * self.accumulation * self.cuts + part

    def parts_of_step(self, count: int, step: int) -> list[Part]:
        """Return this process's parts of an epoch's step, of `count` rows in the epoch."""
        return self.parts(min(count - step * self.step_rows, self.step_rows))


def ranges(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """Return consecutive ranges of that length; the last may be shorter."""
    return [(first, min(first + length, stop)) for first in range(start, stop, length)]


def share_of(rows: int, accumulation: int, world: World) -> Share:
    """Return a process's part of every step."""
    check_divisible(rows, accumulation, world.size)
    return Share(rows, accumulation, world)


class SharedOrder(Sampler[list[int]]):
    """Yield this process's part of each pass of an epoch, or the whole pass, as row numbers."""

    def __init__(
        self,
        lengths: Sequence[int],
        share: Share,
        seed: int,
        arrange: Arrange = order,
        *,
        whole: bool = False,
    ) -> None:
        self.share, self.whole = share, whole
        self.sampler = TrainingOrder(lengths, share.rows, seed, arrange)

    def __len__(self) -> int:
        count = len(self.sampler)
        steps = range(-(-count // self.share.step_rows))
        return sum(len(self.share.parts_of_step(count, step)) for step in steps)

    def __iter__(self) -> Iterator[list[int]]:
        numbers = list(self.sampler)
        for first, last in ranges(0, len(numbers), self.share.step_rows):
            for part in self.share.parts(last - first):
                own = (part.start, part.stop)
                start, stop = (part.first, part.last) if self.whole else own
                yield numbers[first + start : first + stop]
