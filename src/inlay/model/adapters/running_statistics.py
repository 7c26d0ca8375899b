"""Running statistics that no adapter trains stay as they are, also while the model trains.

A batch norm then normalises by its running statistics, as in evaluation. Any other module that
changes its buffers in its forward (observers' ranges, moving averages) gets them back after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import (
    _NormBase as NormBase,  # pyright: ignore[reportPrivateUsage]
)

from inlay.model.adapters.change_class import change_class
from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.fast.base import class_in_place
from inlay.storage.base import FrozenLinear
from inlay.storage.registry import kind


class FrozenBuffers(nn.Module):
    """A module in place, whose buffers are the same after its forward as before it.

    Where an active adapter has its own copy of the buffers, that copy moves.
    """

    original: ClassVar[type[nn.Module]]


class FrozenNorm(FrozenBuffers):
    """A batch or instance norm: it normalises by its running statistics."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training or has_own_statistics(self):
            return super().forward(*args, **kwargs)
        self.training = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = True


class RestoredBuffers(FrozenBuffers):
    """Any other module that holds buffers: it gets them back after its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training or has_own_statistics(self):
            return super().forward(*args, **kwargs)
        before = [(n, b, b.clone(), version(b)) for n, b in saved_buffers(self)]
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name, buffer, kept, then in before:
                # Another tensor, for autograd may have kept the one that was changed.
                self._buffers[name] = buffer if version(buffer) == then else kept


def version(buffer: Tensor) -> int:
    """Return the number of in-place changes of a buffer; while a graph is traced, a new number."""
    if torch.compiler.is_compiling() or buffer.is_inference():
        return next(NEVER_THE_SAME)
    return buffer._version


NEVER_THE_SAME = itertools.count(-1, -1)


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    left_out = module._non_persistent_buffers_set
    return ((n, b) for n, b in module._buffers.items() if b is not None and n not in left_out)


def has_own_statistics(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLayer) and module.holder_of_buffers() is not None


def hold_statistics(model: nn.Module) -> None:
    """Keep every saved buffer of the model as it is, whatever runs, until `release_statistics`."""
    for _, module in list(own_modules(model)):
        plain = isinstance(module, FrozenBuffers | FrozenLinear) or kind(module)
        if not plain and any(saved_buffers(module)):
            frozen = FrozenNorm if isinstance(module, NormBase) else RestoredBuffers
            change_class(module, class_in_place(type(module), frozen))


def release_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FrozenBuffers):
            change_class(module, type(module).original)
