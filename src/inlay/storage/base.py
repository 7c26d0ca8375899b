"""The interface of every frozen weight: a matrix to multiply by, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import StorageError
from inlay.kernels.eight_bits import PREFIX
from inlay.kernels.low_rank import low_rank_linear
from inlay.kernels.switches import is_on

Kind = Literal["linear", "conv1d", "embedding"]
Packed = tuple[list[Tensor], str, int, int]
"""The parts of a weight, its format, out and in, as `kernels.frozen` takes them."""


class FrozenLinear(ABC):
    """A frozen matrix `W` of shape (out, in), with an optional bias of shape (out,).

    A storage implements `matmul`, `matmul_t`, `dequantize` and `requantized`; the rest follows.
    An embedding is the same matrix read column by column: its `x` is integer ids, which stand
    for one-hot rows, so that `matmul(ids) == one_hot(ids) @ W.T`.
    """

    storage: ClassVar[str]
    """The name users type: `dense`, `nf4`, `int8`."""
    layer_kind: ClassVar[Kind] = "linear"
    """The kind of layer, to a method, of a module that is itself a storage."""
    replaces_forward: ClassVar[bool] = False
    """Whether the layer's own forward must not run while adapters are on it."""
    stands_for: Kind = "linear"
    """The kind of the dense layer that it replaces; Conv1D's weight lies as (in, out)."""
    by_weight: ClassVar[bool] = False
    """Whether the layer's own forward runs on the adapted weight, instead of products."""
    linear_in_weight: ClassVar[bool] = True
    """Whether the layer's output is linear in its weight, so that an update can have its own x."""
    stack: int | None = None
    """How many matrices there are, (stack, out, in), where a parameter holds several."""
    factor: float = 1.0
    """The factor of the layer's own forward on the product, as in scaled embeddings."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype that products are computed in."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weight lies."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The bias, (out,), or None."""

    @property
    def padding(self) -> int | None:
        """The id whose row gets no gradient; None for other layers and embeddings without one."""
        return None

    @property
    def channels(self) -> int:
        """How many inputs the layer has; a convolution's matrix has several columns for each."""
        return self.shape[1]

    def turned(self, w: Tensor) -> Tensor:
        """Convert a matrix from (out, in) to the layout of the original layer, or back."""
        return w if self.stands_for == "linear" else w.T

    def finished(self, y: Tensor) -> Tensor:
        """Return the layer's output, given the product."""
        return y if self.factor == 1.0 else y * self.factor

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T` without the bias; x: (*b, in) -> (*b, out)."""

    @abstractmethod
    def matmul_t(self, g: Tensor) -> Tensor:
        """`g @ W`; g: (*b, out) -> (*b, in)."""

    @abstractmethod
    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        """Return the dense (out, in) matrix in `dtype`, or only those rows of it."""

    def requantized(self, w: Tensor, bias: Tensor | None) -> nn.Module:
        """Return a new module of the same format that holds `w` (out, in) and `bias`."""
        raise StorageError(f"the {self.storage} storage cannot hold a changed weight")

    def linear(self, x: Tensor) -> Tensor:
        """`x @ W.T + bias`; x: (*b, in) -> (*b, out)."""
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias

    @property
    def eight_bits(self) -> bool:
        """Whether products are computed in 8 bits; `model.eight_bits` turns it on."""
        return False

    def packing(self, name: str) -> str:
        """Return a format's name with the prefix that says how it is multiplied."""
        return f"{PREFIX}:{name}" if self.eight_bits else name

    def packed(self) -> Packed | None:
        """Return the weight as the operators read it.

        None when it cannot be handed over, as where the weight itself trains.
        """
        return None

    def state(self) -> tuple[object, ...] | None:
        """Return a value that changes when the weight changes; None where there is none."""
        packed = self.packed()
        return None if packed is None else tuple(tensor_identity(part) for part in packed[0])

    def low_rank_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """`x @ (W + s B A).T + bias` in x's dtype; x: (*b, in), a: (r, in), b: (out, r)."""
        packed = self.packed()
        if packed is None or not is_on("products"):
            y = self.linear(x)
            return y + F.linear(F.linear(x, a.to(x.dtype)).to(y.dtype), (scale * b).to(y.dtype))
        return low_rank_linear(x, a, b, self.bias, scale, *packed)


def tensor_identity(tensor: Tensor) -> tuple[object, ...]:
    """Return a tensor's address, version, device, dtype and shape, as far as they are known."""
    version = 0 if tensor.is_inference() else tensor._version
    try:
        place = -1 if hasattr(tensor, "fake_mode") else tensor.data_ptr()
    except RuntimeError:  # a tensor that stands for others, as under torch.func
        place = -1
    return place, version, tensor.device, tensor.dtype, tensor.shape
