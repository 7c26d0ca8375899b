"""Layers whose weights lie in a file or in host memory and are brought in just ahead of use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import StorageError
from inlay.storage.base import FrozenLinear, Packed
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.sources import STREAMED, Rows, Source, streamed_rows
from inlay.storage.weights_file import HostTensor


class StreamedLinear(QuantizedLinear, named=False):
    """A linear layer whose frozen weight is brought in just ahead of use."""

    storage = STREAMED

    def __init__(
        self, source: Source, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None
    ) -> None:
        """Hold a streamed weight of shape (out, in); products run in `dtype`."""
        super().__init__(shape, dtype, bias)
        self.source = source
        self.number = torch.tensor(source.number)

    @classmethod
    def quantized(
        cls, w: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None, **options: Any
    ) -> Self:
        raise StorageError("a weight cannot be streamed before it lies somewhere; see inlay.stream")

    @classmethod
    def unfilled(
        cls, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None, **options: Any
    ) -> Self:
        raise StorageError(f"a streamed weight of shape {shape} has no parts of its own to size")

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Self:
        raise StorageError(f"a streamed layer takes no weight, but was given {', '.join(tensors)}")

    def serialized(self) -> dict[str, Tensor]:
        return {}

    def parts(self) -> list[Tensor]:
        return [self.number]

    def packed(self) -> Packed:
        return self.parts(), self.packing(self.source.format), self.out_features, self.in_features

    @torch.no_grad()
    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.source.dequantize(dense, 0)
        return dense if rows is None else dense[rows]

    def dequantized_rows(self, rows: Tensor) -> Tensor:
        return self.dequantize(rows)

    def requantized(self, w: Tensor, bias: Tensor | None) -> QuantizedLinear:
        del w, bias
        raise StorageError(UNCHANGEABLE)

    @property
    def device(self) -> torch.device:
        return self.source.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.compute_dtype = stays(self, fn)
        nn.Module._apply(self, fn, recurse)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        raise StorageError(UNSAVED)


class StreamedEmbedding(nn.Embedding, FrozenLinear):
    """An embedding of which only the rows looked up are read."""

    storage = STREAMED
    layer_kind = stands_for = "embedding"

    def __init__(self, source: Rows, like: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx, self.compute_dtype = like.padding_idx, like.weight.dtype
        self.source = source
        self.number = torch.tensor(source.number)

    @property
    def shape(self) -> tuple[int, int]:
        return self.embedding_dim, self.num_embeddings

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def bias(self) -> Tensor | None:
        return None

    @property
    def padding(self) -> int | None:
        return self.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        return self.matmul(input)

    def matmul(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return F.linear(x, self.dequantize())
        return streamed_rows(x, self.number, self.embedding_dim, self.dtype)

    def matmul_t(self, g: Tensor) -> Tensor:
        return g @ self.dequantize()

    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        table = self.source.table.load().to(self.device, self.dtype).T
        return table if rows is None else table[rows]

    def requantized(self, w: Tensor, bias: Tensor | None) -> nn.Module:
        table = HostTensor(w.detach().T.to("cpu", self.dtype).contiguous())
        rows, width = table.shape
        like = nn.Embedding(rows, width, self.padding_idx, dtype=self.dtype, device="meta")
        return StreamedEmbedding(Rows(table, self.device), like).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.compute_dtype = stays(self, fn)
        nn.Module._apply(self, fn, recurse)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        if not isinstance(self.source.table, HostTensor):
            raise StorageError(UNSAVED)
        destination[f"{prefix}weight"] = self.source.table.tensor


UNSAVED = (
    "a streamed model's weights stay where they are and are not saved again; inlay.save_adapter "
    "saves what was trained"
)
UNCHANGEABLE = (
    "a streamed weight cannot be changed; load the model without streaming and the adapter on it"
)


def stays(layer: FrozenLinear, fn: Callable[[Tensor], Tensor]) -> torch.dtype:
    """Return the dtype that a module-wide cast gives; raise where it moves the layer."""
    like = fn(torch.empty(0, dtype=layer.dtype, device=layer.device))
    if like.device.type != layer.device.type:
        raise StorageError(
            f"a streamed model stays on the device it was loaded for, {layer.device}; load it "
            f"with device='{like.device}'"
        )
    return like.dtype
