"""Answers that several processes draw: together, those that one process would have drawn."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from inlay.evaluate.generation import Sampling, continued
from inlay.model.stream.shard import is_sharded
from inlay.train.output.state import random_state, restore_random_state
from inlay.train.processes.world import World


class SharedDraws(LogitsProcessor):
    """Turns logits into numbers whose greatest is the token drawn.

    It is argmax p / q with q exponential, as in `torch.multinomial`. q is drawn for the answers of
    all processes, (answers, vocabulary), and each takes the rows of its own.
    """

    def __init__(self, sampling: Sampling, world: World) -> None:
        self.world = world
        self.warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.drawn = 0
        """Tokens of each answer so far."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the numbers, (this process's answers, vocabulary)."""
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        own = self.world.rank * len(scores)
        return scores.softmax(dim=-1) / self.draw(scores)[own : own + len(scores)]

    def draw(self, like: Tensor) -> Tensor:
        """Return q for one token of every process's answers, as many as `like` has rows."""
        self.drawn += 1
        self.like = like
        return like.new_empty(len(like) * self.world.size, like.shape[1]).exponential_()

    def catch_up(self) -> None:
        """Draw as often as the process with the longest answer, and the order of the answers.

        TRL shuffles a step's answers; that one process would have drawn for all of them.
        """
        for _ in range(max(self.world.every(self.drawn)) - self.drawn):
            self.draw(self.like)
        torch.randperm(len(self.like) * self.world.size)


class Stream:
    """The random numbers that one process would draw from, in each of several."""

    def __init__(self) -> None:
        self.state: Any = None

    @contextmanager
    def kept(self) -> Generator[None]:
        """Let a pass draw numbers of its own in the `with` block; the stream goes on after it."""
        self.state = random_state()
        yield
        restore_random_state(self.state)

    @contextmanager
    def taken(self) -> Generator[None]:
        """Draw from the stream in the `with` block, which stands inside one of `kept`."""
        own = random_state()
        restore_random_state(self.state)
        yield
        self.state = random_state()
        restore_random_state(own)


def drawn_together(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    sampling: Sampling,
    world: World,
) -> list[list[int]]:
    """Return the new tokens after each prompt of this process, the ones that end them included.

    Args:
        model: what answers; where its weights are divided all processes stay in step.
        prompts: this process's, as many as every other's.
        config: how to generate the likeliest answer.
        sampling: how tokens are drawn in its place.
        world: the processes.
    """
    draws = SharedDraws(sampling, world)
    processors = LogitsProcessorList([draws])
    synced = is_sharded(model)
    new = continued(model, prompts, config, processors=processors, synced=synced)
    draws.catch_up()
    return new
