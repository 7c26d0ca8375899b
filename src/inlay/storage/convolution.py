"""Convolutions: the kernel (out, in / groups, k, …) is a matrix (out, in / groups * k * …)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from inlay.storage.own import ByWeight, holds_floats, own_class

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Convolution(ByWeight):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with whatever stride, padding and groups."""

    @property
    def linear_in_weight(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return own_class(self.layer) in CONVOLUTIONS

    def matrix(self) -> Tensor:
        return self.weight.flatten(1)

    def as_stored(self, w: Tensor) -> Tensor:
        return w.reshape(self.weight.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def channels(self) -> int:
        return self.weight.shape[1]

    @property
    def groups(self) -> int:
        layer: Any = self.layer
        return layer.groups


def is_convolution(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and holds_floats(module, "weight")
