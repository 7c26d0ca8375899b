"""The order of prompts: whole steps, each prompt as often as it is answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from inlay.train.order import TrainingOrder
from inlay.train.processes.world import ALONE, World


@dataclass(frozen=True)
class Group:
    """How many answers are compared, and how many make a step of one process."""

    answers: int
    """To one prompt."""
    step: int
    """In one optimiser step, all prompts of this process together."""
    passes: int
    """Forward passes to a step."""

    @property
    def prompts(self) -> int:
        return self.step // self.answers


class PromptOrder(TrainingOrder):
    """Yield a step's prompts, each once an answer, once for every forward pass of the step.

    The order is a function of the seed and the epoch, short and long prompts mixed; those that do
    not fill a step are left out of the epoch. Several processes take a step's prompts in turn.
    """

    def __init__(
        self, lengths: Sequence[int], group: Group, seed: int, world: World = ALONE
    ) -> None:
        super().__init__(lengths, group.prompts * world.size, seed)
        self.group, self.world = group, world

    def __len__(self) -> int:
        steps = len(self.lengths) // self.batch_size
        return steps * self.group.step * self.group.passes

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        own = self.world.rank * self.group.prompts
        for start in range(0, len(rows) - self.batch_size + 1, self.batch_size):
            step = rows[start + own : start + own + self.group.prompts]
            for _ in range(self.group.passes):
                yield from (row for row in step for _ in range(self.group.answers))
