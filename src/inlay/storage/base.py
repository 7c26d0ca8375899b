"""What every frozen weight offers, however it is held: a matrix to use, not to look inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.errors import StorageError

Kind = Literal["linear", "conv1d", "embedding"]


class FrozenLinear(ABC):
    """A frozen matrix `W` of shape (out, in), with an optional bias of shape (out,).

    A storage implements `matmul`, `matmul_t`, `dequantize` and `requantized`; the rest follows.
    An embedding is the same matrix read column by column: its `x` is integer ids, which stand
    for one-hot rows, so that `matmul(ids) == one_hot(ids) @ W.T`.
    """

    storage: ClassVar[str]
    """The name users type: `dense`, `nf4`, `int8`."""

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
