"""Dense weights, kept in the dtype they were loaded in, seen through the storage protocol.

The layer stays the model's own `nn.Linear`, `nn.Embedding` or transformers `Conv1D`; these
views only translate. Nothing is copied.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from inlay.kernels.formats import DENSE, reads_on_cpu
from inlay.kernels.frozen import biased_linear, frozen_linear, frozen_linear_t
from inlay.kernels.scratch import product_dtype
from inlay.kernels.switches import is_on
from inlay.storage.base import FrozenLinear, Packed, tensor_identity

SAMPLED_COLUMNS = 8


class DenseView(FrozenLinear):
    """A layer's own dense weight; subclasses say how it lies in memory."""

    storage = "dense"

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        weight: Tensor = held(self.layer, "weight")
        return weight

    @property
    def bias(self) -> Tensor | None:
        return held(self.layer, "bias")

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix().shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def matrix(self) -> Tensor:
        """The weight as (out, in), without a copy."""
        return self.turned(self.weight)

    def packed(self) -> Packed | None:
        weight = self.weight
        matrix = self.turned(weight)
        rows, columns = matrix.shape
        return None if weight.requires_grad else ([matrix], self.packing(DENSE), rows, columns)

    @torch.no_grad()
    def state(self) -> tuple[object, ...] | None:
        """Where the weight lies, and a sum over every row: `weight.data.copy_` leaves no trace.

        None on other devices than a CPU, where to read a sum stops the queue.
        """
        weight = self.weight
        if weight.device.type != "cpu":
            return (tensor_identity(weight),) if weight.is_meta else None
        matrix = self.matrix()
        some = matrix[:, :: max(1, matrix.shape[1] // SAMPLED_COLUMNS)].float().sum(1)
        rows = torch.arange(1, len(some) + 1, dtype=some.dtype)
        return tensor_identity(weight), float((some * rows).sum())

    @property
    def eight_bits(self) -> bool:
        return bool(vars(self.layer).get("computes_in_8_bits"))

    def multiplied_elsewhere(self, x: Tensor) -> Packed | None:
        """Return the packed weight where one of Inlay's operators multiplies x; else None."""
        as_it_is = product_dtype(x) == x.dtype and not self.eight_bits
        if not is_on("products") or (as_it_is and not self.read_by_own_product(x)):
            return None
        return self.packed()

    def read_by_own_product(self, x: Tensor) -> bool:
        """Return whether x and this weight are multiplied by a product of Inlay's own.

        A compiler is given PyTorch's product, as it cannot follow whether the C library is there.
        """
        compiled = torch.compiler.is_compiling()
        return not compiled and self.dtype == x.dtype and reads_on_cpu(DENSE, x, x.shape[-1])

    def matmul(self, x: Tensor) -> Tensor:
        packed = self.multiplied_elsewhere(x)
        return frozen_linear(x, *packed) if packed else F.linear(x, self.matrix())

    def linear(self, x: Tensor) -> Tensor:
        packed, bias = self.multiplied_elsewhere(x), self.bias
        if packed is None:
            return F.linear(x, self.matrix(), bias)
        return frozen_linear(x, *packed) if bias is None else biased_linear(x, bias, *packed)

    def matmul_t(self, g: Tensor) -> Tensor:
        packed = self.multiplied_elsewhere(g)
        return frozen_linear_t(g, *packed) if packed else g @ self.matrix()

    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        matrix = self.matrix().detach()
        return matrix if rows is None else matrix[rows]

    @abstractmethod
    def empty(self) -> nn.Module:
        """Return a plain layer of the same shape and options on the meta device."""

    def requantized(self, w: Tensor, bias: Tensor | None) -> nn.Module:
        layer = self.empty()
        stored = self.turned(w.detach()).to(self.dtype).contiguous()
        layer.weight = nn.Parameter(stored, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(self.dtype), requires_grad=False)
        return layer.train(self.layer.training)


def held(layer: nn.Module, name: str) -> Any:
    """Return a layer's weight or bias without the adapters on it."""
    reader = getattr(type(layer), "stored_parameter", None)
    return getattr(layer, name, None) if reader is None else reader(layer, name)


class DenseLinear(DenseView):
    """`nn.Linear`: weight (out, in)."""

    def empty(self) -> nn.Module:
        out, width = self.shape
        return nn.Linear(width, out, bias=self.bias is not None, device="meta")


class DenseConv1D(DenseView):
    """transformers' `Conv1D` (GPT-2): weight (in, out)."""

    stands_for = "conv1d"

    def empty(self) -> nn.Module:
        out, width = self.shape
        with torch.device("meta"):
            return Conv1D(out, width)


class DenseEmbedding(DenseView):
    """`nn.Embedding`: weight (vocabulary, width); read as (width, vocabulary) on one-hot ids."""

    stands_for = "embedding"

    def empty(self) -> nn.Module:
        width, vocabulary = self.shape
        return nn.Embedding(vocabulary, width, padding_idx=self.padding, device="meta")

    @property
    def padding(self) -> int | None:
        layer: Any = self.layer
        return layer.padding_idx

    def matmul(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return F.linear(x, self.matrix())
        return F.embedding(x, self.weight, self.padding)

    def linear(self, x: Tensor) -> Tensor:
        return self.matmul(x)


VIEWS: dict[type[nn.Module], type[DenseView]] = {
    nn.Linear: DenseLinear,
    nn.Embedding: DenseEmbedding,
    Conv1D: DenseConv1D,
}
