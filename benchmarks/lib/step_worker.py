"""A contestant's process: builds its model, then takes optimiser steps when it is asked to.

Started by `turns.Worker`; the first request names the contestant and its folders.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.contestants import CONTESTANTS
from benchmarks.lib.machine import THREADS
from benchmarks.lib.turns import Parent, PeakMemory, serve

BATCHES = 2
"""Batches of random tokens, used one after another over and over, so that the loss falls."""


def work(parent: Parent, spec: dict[str, Any]) -> None:
    """Build, then step until the parent is gone."""
    torch.set_num_threads(THREADS)
    contestant = CONTESTANTS[spec["storage"], spec["contestant"]]
    started = time.perf_counter()
    model = contestant.build(spec["base"], spec["adapter"]).train()
    weights = touched(model)
    training = Training(model, spec)
    memory = PeakMemory()
    parent.answer(weights_bytes=weights, build_seconds=time.perf_counter() - started)
    while True:
        steps = [training.step() for _ in range(parent.wait()["steps"])]
        parent.answer(
            seconds=[seconds for seconds, _ in steps],
            losses=[loss for _, loss in steps],
            peak_bytes=memory.above(),
        )


def touched(model: nn.Module) -> int:
    """Read every weight once, so that none is still on disk; return their bytes."""
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        tensor.detach().flatten().view(torch.uint8)[::1024].sum()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Training:
    """The plain loop: the model's own loss, backward, AdamW."""

    def __init__(self, model: nn.Module, spec: dict[str, Any]) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.model = model
        self.optimizer = torch.optim.AdamW(trained, lr=spec["learning_rate"])
        self.batches = batches(spec["tokens"], spec["vocab"], spec["seed"])

    def step(self) -> tuple[float, float]:
        """Take one optimiser step; return its seconds and its loss."""
        ids = next(self.batches)
        started = time.perf_counter()
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started, loss.item()


def batches(tokens: int, vocab: int, seed: int) -> Iterator[Tensor]:
    """Yield sequences of random tokens, every one labelled."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(vocab, (1, tokens), generator=generator) for _ in range(BATCHES)]
    while True:
        yield from drawn


if __name__ == "__main__":
    serve(work)
