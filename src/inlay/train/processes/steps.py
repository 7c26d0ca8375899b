"""A trainer's steps, divided among processes: each runs its own passes, the gradients are added.

The trainer underneath believes that it is alone. The sum of all processes' gradients is the
gradient that one process would have found on the same rows, to rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from inlay.model.stream.shard import is_sharded
from inlay.train.order import TrainingOrder, order
from inlay.train.processes.share import WHOLE, Part, Share, SharedOrder


class SharedSteps(Trainer, ABC):
    """The part of every task's trainer that knows of other processes."""

    whole_passes: ClassVar[bool] = False
    """Whether the loss of a pass is of all its rows at once, and no mean of its parts' losses.

    Every process then gets the rows of the whole pass, computes its loss, and finds the part of the
    gradient that goes through its own rows.
    """

    def arrange(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
        """Return the row numbers of an epoch in the order in which they are trained."""
        return order(lengths, batch_size, seed, epoch)

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """How many tokens each row has, or each pack of rows."""

    def take_share(self, share: Share) -> None:
        self.share, self.world = share, share.world
        self.passes_done = 0
        """Of the present step, in this process."""

    @cached_property
    def epoch_rows(self) -> int:
        """Rows, or packs of rows, in an epoch: counted once, as every step asks."""
        return len(self.lengths)

    @property
    def steps_in_epoch(self) -> int:
        """Optimiser steps that pass over all rows."""
        return math.ceil(self.epoch_rows / self.share.step_rows)

    @property
    def parts(self) -> list[Part]:
        """This process's parts of the present step."""
        step = self.state.global_step % self.steps_in_epoch
        return self.share.parts_of_step(self.epoch_rows, step)

    @property
    def part(self) -> Part:
        """This process's part of the next pass."""
        return WHOLE if self.world.alone else self.parts[self.passes_done]

    @property
    def pass_counts(self) -> bool:
        """Whether the next pass counts, or only keeps the processes in step."""
        return self.part.weight > 0

    def mean_in_pass(self, total: float, count: int) -> float:
        """Return the mean over a pass of what this process found `total` of in `count` cases.

        A pass that counts nothing has the mean of its own; nan where there is no case.
        """
        mine = (total, float(count))
        found = self.world.every(mine if self.pass_counts else (0.0, 0.0))
        parts = [mine]
        if self.pass_counts:
            parts = [found[rank] for rank in self.share.companions]
        cases = sum(n for _, n in parts)
        return sum(t for t, _ in parts) / cases if cases else math.nan

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        del train_dataset
        return TrainingOrder(self.lengths, self.share.rows, self.args.seed, self.arrange)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return what yields this process's passes."""
        if self.world.alone:
            return super().get_train_dataloader()
        assert isinstance(self.train_dataset, Dataset)
        rows: Any = self._remove_unused_columns(self.train_dataset, description="training")
        collate: Any = self.data_collator
        loader: Any = DataLoader(
            rows,
            batch_sampler=SharedOrder(
                self.lengths, self.share, self.args.seed, self.arrange, whole=self.whole_passes
            ),
            collate_fn=collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return a step's own passes, and how many tokens all processes' passes train on."""
        samples, count = super().get_batch_samples(*args, **kwargs)
        if self.world.alone or count is None:
            return samples, count
        counting = [s for s, part in zip(samples, self.parts, strict=True) if part.weight]
        own: Any = self._get_num_items_in_batch(counting, self.args.device) or 0
        (total,) = self.world.total([float(own)])
        return samples, torch.tensor(int(total), device=self.args.device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one pass; return its loss as it counts in the step's.

        Dropout is drawn for the pass, so that it does not matter which process runs it.
        """
        if self.world.alone:
            return super().training_step(*args, **kwargs)
        counted = kwargs.get("num_items_in_batch", args[2] if len(args) > 2 else None)
        part, mean_of = self.part, self.current_gradient_accumulation_steps
        factor = part.weight * mean_of if counted is None else float(part.weight > 0)
        of_gradient = part.pass_weight * mean_of if self.whole_passes else factor
        seed = self.share.seed_of(self.args.seed, self.state.global_step, self.passes_done)
        torch.manual_seed(seed)
        with weighted_backward(self.accelerator, of_gradient):
            loss: Tensor = super().training_step(*args, **kwargs)
        self.passes_done += 1
        return factor * loss

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by the sum of all processes', in one transfer for each dtype.

        Every process gets the same bits: each part of the sum is made in one place and sent on.
        """
        self.passes_done = 0
        kept = list(parameters)
        for dtype in dict.fromkeys(p.dtype for p in kept):
            same = [p for p in kept if p.dtype == dtype]
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in same]
            flat = torch.cat([g.reshape(-1) for g in found])
            dist.all_reduce(flat)
            for p, part in zip(same, flat.split([p.numel() for p in same]), strict=True):
                p.grad = part.view_as(p)


@contextmanager
def weighted_backward(accelerator: Any, factor: float) -> Generator[None]:
    """Let a pass's loss count by a factor; a trainer leaves no other place before the backward."""
    backward = accelerator.backward

    def weighted(loss: Tensor, **kwargs: Any) -> None:
        backward(factor * loss, **kwargs)

    accelerator.backward = weighted
    try:
        yield
    finally:
        del accelerator.backward
