"""A frozen weight with one weight method on it, which is again a frozen weight."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.methods.base import Params, WeightMethod
from inlay.storage.base import FrozenLinear, tensor_identity


class Composed(FrozenLinear):
    """What the next method on a layer takes for its base: `base` with `method` applied."""

    storage = "composed"

    def __init__(
        self, base: FrozenLinear, method: WeightMethod, params: Params, training: bool
    ) -> None:
        self.base, self.method, self.params, self.training = base, method, params, training

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def padding(self) -> int | None:
        return self.base.padding

    @property
    def bias(self) -> Tensor | None:
        return self.method.bias(self.params, self.base.bias)

    def linear(self, x: Tensor) -> Tensor:
        return self.method.forward(self.params, x, self.base, self.training)

    def matmul(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.bias is None else y - self.bias

    def matmul_t(self, g: Tensor) -> Tensor:
        return g @ self.dequantize()

    def state(self) -> tuple[object, ...] | None:
        below = self.base.state()
        return None if below is None else (*below, *map(tensor_identity, self.params.parameters()))

    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        w = self.method.weight(self.params, self.base.dequantize())
        return w if rows is None else w[rows]
