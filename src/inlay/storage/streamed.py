"""Weights that lie in a file or in host memory and are brought in just ahead of use.

To the operators this is one more packed format: its only part is a number, under which the
weight's whereabouts are found. So whatever works on packed layers works on these, and autograd
keeps nothing of them but the number.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import StorageError
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.formats import FORMATS, Format
from inlay.kernels.opaque import operator
from inlay.storage.base import FrozenLinear, Packed
from inlay.storage.buffers import Block, Buffers
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.weights_file import HostTensor, Stored

STREAMED = "streamed"
SMALL = 1 << 14
"""Bytes below which a packed part stays in memory."""
SEGMENT = 64 << 20
"""Bytes of a dense weight that are brought in at once."""
NUMBERS = itertools.count()
SOURCES: weakref.WeakValueDictionary[int, Source | Rows] = weakref.WeakValueDictionary()
"""The number in a layer's only part -> its weight's whereabouts."""


@dataclass(frozen=True)
class Segment:
    """Rows [first, first + rows) of a weight: the parts that stay, and places of those brought in.

    A part that is brought in is a pair: where it lies, and its place in the block's buffer.
    """

    first: int
    rows: int
    block: int
    parts: tuple[Tensor | tuple[Stored, int], ...]

    def found_in(self, buffer: Tensor) -> list[Tensor]:
        """Return the packed parts, those brought in as they lie in the buffer."""
        return [
            part if isinstance(part, Tensor) else part[0].found_in(buffer[part[1] :])
            for part in self.parts
        ]


class Source:
    """One weight's whereabouts: its format, its segments, the buffers that they pass through."""

    def __init__(self, packing: str, segments: Sequence[Segment], buffers: Buffers) -> None:
        self.packing, self.segments, self.buffers = packing, segments, buffers
        whole = len(segments) == 1 and FORMATS[packing].product is not None
        self.format = streamed_format(packing) if whole else STREAMED
        """The name under which the operators know the weight: in one piece, that of its product."""
        self.number = registered(self)

    @property
    def device(self) -> torch.device:
        """Where products run."""
        return self.buffers.device

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        """A copied layer reads the same weight."""
        return self

    def dequantize(self, out: Tensor, first: int) -> None:
        """Write the weight's rows [first, first + len(out)) into `out`."""
        last = first + len(out)
        for segment in self.segments:
            start = max(first, segment.first)
            end = min(last, segment.first + segment.rows)
            if start < end:
                with self.buffers.use(segment.block) as buffer:
                    FORMATS[self.packing].dequantize(
                        segment.found_in(buffer), out[start - first : end - first],
                        start - segment.first,
                    )  # fmt: skip

    def multiplied(
        self, x: Tensor, width: int, transposed: bool, epilogue: Epilogue, dtype: torch.dtype
    ) -> Tensor | None:
        """Return `x @ W.T`, or `x @ W`, by the product of the format; the weight is one segment."""
        (segment,) = self.segments
        own = FORMATS[self.packing].product
        assert own is not None
        with self.buffers.use(segment.block) as buffer:
            return own(x, segment.found_in(buffer), width, transposed, epilogue, dtype)


class Rows:
    """A table of which only the rows asked for are read."""

    def __init__(self, table: Stored, device: torch.device) -> None:
        self.table, self.device = table, device
        self.number = registered(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        """A copied layer reads the same table."""
        return self

    def take(self, ids: Tensor) -> Tensor:
        """Return (*ids, width) rows, each read once."""
        unique, places = ids.reshape(-1).cpu().unique(return_inverse=True)
        count = self.table.shape[0]
        if unique.numel() and not 0 <= int(unique[0]) <= int(unique[-1]) < count:
            raise StorageError(
                f"ids from {int(unique[0])} to {int(unique[-1])} were looked up in a table of "
                f"{count} rows; the tokenizer is not this model's"
            )
        return self.table.take(unique)[places].view(*ids.shape, -1).to(self.device)


def registered(source: Source | Rows) -> int:
    """Give a weight's whereabouts a number."""
    number = next(NUMBERS)
    SOURCES[number] = source
    return number


def found(number: Tensor) -> Source | Rows:
    """Return the whereabouts that a layer's part stands for."""
    source = SOURCES.get(int(number))
    if source is None:
        raise StorageError("the streamed model that this computation belongs to was deleted")
    return source


def source_of(parts: Sequence[Tensor]) -> Source:
    """Return the whereabouts of a layer's weight."""
    source = found(parts[0])
    assert isinstance(source, Source)
    return source


def dequantize_streamed(parts: Sequence[Tensor], out: Tensor, first: int) -> None:
    """Write rows of a streamed weight into `out`, once they are brought in."""
    source_of(parts).dequantize(out, first)


def product(
    x: Tensor,
    parts: Sequence[Tensor],
    width: int,
    transposed: bool,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return `x @ W.T`, or `x @ W`, the weight brought in and read as it is held; or None."""
    return source_of(parts).multiplied(x, width, transposed, epilogue, dtype)


@cache
def streamed_format(packing: str) -> str:
    """Name the format of weights that are brought in to be multiplied by this one's product."""
    name = f"{STREAMED}-{packing}"
    on_cpu = FORMATS[packing].product_on_cpu
    FORMATS[name] = Format(dequantize_streamed, product, product_on_cpu=on_cpu)
    return name


FORMATS[STREAMED] = Format(dequantize_streamed)


@operator("streamed_rows")
def streamed_rows(ids: Tensor, number: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return (*ids, width) rows of a streamed table."""
    source = found(number)
    assert isinstance(source, Rows)
    return source.take(ids).to(dtype)


@streamed_rows.register_fake
def _(ids: Tensor, number: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, width, dtype=dtype)


class StreamedLinear(QuantizedLinear, named=False):
    """A linear layer whose frozen weight is brought in just ahead of use."""

    storage = STREAMED

    def __init__(
        self, source: Source, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None
    ) -> None:
        """Hold a weight of shape (out, in) that lies elsewhere; products run in `dtype`."""
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
        """Take the place of `like`."""
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
        """Return (*ids, width) rows of the table."""
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
        """Describe the layer as `nn.Embedding` does."""
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
    """Return the dtype that a module-wide cast or move gives; raise when it is a move."""
    like = fn(torch.empty(0, dtype=layer.dtype, device=layer.device))
    if like.device.type != layer.device.type:
        raise StorageError(
            f"a streamed model stays on the device it was loaded for, {layer.device}; load it "
            f"with device='{like.device}'"
        )
    return like.dtype


class Layout:
    """Gives weights their places in blocks, in the order they are added; then builds the buffers.

    Layers of one block are brought in together; a dense weight that is large and in no block is
    brought in by rows.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.names: list[str | None] = []

    def packed(self, name: str, rows: int, parts: Sequence[Tensor | Stored]) -> list[Segment]:
        """Place a packed weight in the block of this name."""
        return [self.segment(self.block(name), 0, rows, parts)]

    def dense(self, name: str | None, weight: Stored) -> list[Segment]:
        """Place a dense weight (out, in) in the block of this name, or in as many as it needs."""
        rows = weight.shape[0]
        step = rows if name else max(1, SEGMENT * rows // weight.nbytes)
        segments: list[Segment] = []
        for first in range(0, rows, step):
            last = min(first + step, rows)
            block = self.block(name)
            segments.append(self.segment(block, first, last - first, [weight.rows(first, last)]))
        return segments

    def block(self, name: str | None) -> int:
        """Return the number of the block of this name; a new one for None."""
        if name is None or name not in self.names:
            self.names.append(name)
            self.blocks.append(Block())
            return len(self.blocks) - 1
        return self.names.index(name)

    def segment(
        self, block: int, first: int, rows: int, parts: Sequence[Tensor | Stored]
    ) -> Segment:
        """Place a segment's parts in a block."""
        placed = [p if isinstance(p, Tensor) else (p, self.blocks[block].add(p)) for p in parts]
        return Segment(first, rows, block, tuple(placed))
