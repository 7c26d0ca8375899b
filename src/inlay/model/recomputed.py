"""The blocks that gradient checkpointing recomputes, and how they may read a key-value cache."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from inlay.model.seams.transformers import (
    CHECKPOINTING,
    READS_CACHE,
    GradientCheckpointingLayer,
    checkpointing_function,
)


@dataclass(frozen=True)
class Recomputed:
    """The modules of a model that gradient checkpointing is on for.

    The blocks drop the key-value cache unless they say that they only read it; what is around them
    drops it where its own flag is set.
    """

    blocks: tuple[nn.Module, ...]
    around: tuple[nn.Module, ...]

    def read_cache(self, allowed: bool) -> None:
        """Have the blocks keep the cache that they are given, or drop it again."""
        for block in self.blocks:
            vars(block).pop(READS_CACHE, None)
            vars(block).update({READS_CACHE: True} if allowed else {})
        for module in self.around:
            vars(module)[CHECKPOINTING] = not allowed

    @contextmanager
    def off(self) -> Generator[None]:
        before = [(module, vars(module)[CHECKPOINTING]) for module in (*self.blocks, *self.around)]
        for module, _ in before:
            vars(module)[CHECKPOINTING] = False
        try:
            yield
        finally:
            for module, was in before:
                vars(module)[CHECKPOINTING] = was


def recomputed(model: nn.Module) -> Recomputed | None:
    """Return what gradient checkpointing is on for; None where no block of it can read a cache.

    Autograd must see what a block reads beside its inputs, so reentrant checkpointing cannot.
    """
    on = [m for m in model.modules() if vars(m).get(CHECKPOINTING, False)]
    blocks = [m for m in on if isinstance(m, GradientCheckpointingLayer)]
    for module in on:
        words = getattr(checkpointing_function(module), "keywords", {})
        inside = any(isinstance(m, GradientCheckpointingLayer) for m in module.modules())
        if not inside or words.get("use_reentrant"):
            return None
    return Recomputed(tuple(blocks), tuple(m for m in on if m not in blocks))
