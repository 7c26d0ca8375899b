"""Running statistics that no adapter trains stay as they are, also while the model trains.

A batch norm then normalises by its running statistics, as in evaluation. Any other module that
changes its buffers in its forward (observers' ranges, moving averages) gets them back after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import (
    _NormBase as NormBase,  # pyright: ignore[reportPrivateUsage]
)

from inlay.model.adapters.instance import change_class
from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.fast.base import with_signature
from inlay.storage.base import FrozenLinear
from inlay.storage.registry import kind


class Steady(nn.Module):
    """A module in place, whose buffers are the same after its forward as before it."""

    moving: ClassVar[type[nn.Module]]


class SteadyNorm(Steady):
    """A batch or instance norm with running statistics."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise by the running statistics, unless an active adapter has its own."""
        if not self.training or has_own_statistics(self):
            return super().forward(*args, **kwargs)
        self.training = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = True


class SteadyBuffers(Steady):
    """Any other module that holds buffers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and put its buffers back."""
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
    """Return how often a buffer was changed in place; while a graph is traced, never the same."""
    if torch.compiler.is_compiling() or buffer.is_inference():
        return next_number()
    return buffer._version


def next_number(count: list[int] = [0]) -> int:  # noqa: B006
    """Return a number that was not returned before."""
    count[0] += 1
    return -count[0]


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every buffer that a module holds itself and that is saved with the model."""
    left_out = module._non_persistent_buffers_set
    return ((n, b) for n, b in module._buffers.items() if b is not None and n not in left_out)


def has_own_statistics(module: nn.Module) -> bool:
    """Say whether an active adapter has its own copy of the module's statistics."""
    return isinstance(module, AdaptedLayer) and module.holder_of_buffers() is not None


def hold_statistics(model: nn.Module) -> None:
    """Keep every buffer of the model as it is, in place, whatever runs."""
    for _, module in list(own_modules(model)):
        if (
            isinstance(module, Steady | FrozenLinear)
            or kind(module)
            or not any(saved_buffers(module))
        ):
            continue
        is_norm = isinstance(module, NormBase)
        change_class(module, steady_class(type(module), SteadyNorm if is_norm else SteadyBuffers))


def release_statistics(model: nn.Module) -> None:
    """Let the model's buffers move again."""
    for module in model.modules():
        if isinstance(module, Steady):
            change_class(module, type(module).moving)


@cache
def steady_class(moving: type[nn.Module], steady: type[Steady]) -> type[nn.Module]:
    """Return the subclass of `moving` whose buffers stay; its name and signature stay the same."""
    body: dict[str, Any] = {
        "moving": moving,
        "original": moving,
        "__module__": moving.__module__,
        "__qualname__": moving.__qualname__,
        "__doc__": moving.__doc__,
        "forward": with_signature(steady.forward, moving),
    }
    return type(moving.__name__, (steady, moving), body)
