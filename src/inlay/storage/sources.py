"""Where streamed weights lie, and how the operators reach them.

To the operators a streamed weight is one more packed format: its only part is a number, under which
its source is found. Autograd keeps nothing of it but the number.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from inlay.errors import StorageError
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.formats import FORMATS, Format
from inlay.kernels.opaque import operator
from inlay.storage.buffers import Block, Buffers
from inlay.storage.weights_file import Stored

STREAMED = "streamed"
SMALL = 1 << 14
"""Bytes below which a packed part stays in memory."""
SEGMENT = 64 << 20
"""Bytes of a dense weight that are brought in at once."""
NUMBERS = itertools.count()
SOURCES: weakref.WeakValueDictionary[int, Source | Rows] = weakref.WeakValueDictionary()
"""The number in a layer's only part -> where its weight lies."""


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
    """Where one weight lies: its format, its segments, the buffers that they pass through."""

    def __init__(self, packing: str, segments: Sequence[Segment], buffers: Buffers) -> None:
        self.packing, self.segments, self.buffers = packing, segments, buffers
        whole = len(segments) == 1 and FORMATS[packing].product is not None
        self.format = streamed_format(packing) if whole else STREAMED
        """The weight's format to the operators; a weight in one segment keeps its own product."""
        self.number = registered(self)

    @property
    def device(self) -> torch.device:
        return self.buffers.device

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
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
    number = next(NUMBERS)
    SOURCES[number] = source
    return number


def found(number: Tensor) -> Source | Rows:
    source = SOURCES.get(int(number))
    if source is None:
        raise StorageError("the streamed model that this computation belongs to was deleted")
    return source


def source_of(parts: Sequence[Tensor]) -> Source:
    source = found(parts[0])
    assert isinstance(source, Source)
    return source


def dequantize_streamed(parts: Sequence[Tensor], out: Tensor, first: int) -> None:
    """Write rows of a streamed weight into `out`, once they are brought in."""
    source_of(parts).dequantize(out, first)


@cache
def streamed_format(packing: str) -> str:
    """Register a streamed variant of a format that has its own product; return its name."""
    name = f"{STREAMED}-{packing}"
    on_cpu = FORMATS[packing].product_on_cpu
    FORMATS[name] = Format(
        dequantize_streamed,
        lambda x, parts, *rest: source_of(parts).multiplied(x, *rest),
        product_on_cpu=on_cpu,
    )
    return name


FORMATS[STREAMED] = Format(dequantize_streamed)


@operator("streamed_rows")
def streamed_rows(ids: Tensor, number: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    source = found(number)
    assert isinstance(source, Rows)
    return source.take(ids).to(dtype)


streamed_rows.register_fake(
    lambda ids, number, width, dtype: ids.new_empty(*ids.shape, width, dtype=dtype)
)


class Layout:
    """Gives weights their places in blocks, in the order they are added; then builds the buffers.

    Layers of one block are brought in together; a dense weight that is large and in no block is
    brought in by rows.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.names: list[str | None] = []

    def packed(self, name: str, rows: int, parts: Sequence[Tensor | Stored]) -> list[Segment]:
        return [self.segment(self.block(name), 0, rows, parts)]

    def dense(self, name: str | None, weight: Stored) -> list[Segment]:
        rows = weight.shape[0]
        step = rows if name else max(1, SEGMENT * rows // weight.nbytes)
        segments: list[Segment] = []
        for first in range(0, rows, step):
            last = min(first + step, rows)
            block = self.block(name)
            segments.append(self.segment(block, first, last - first, [weight.rows(first, last)]))
        return segments

    def block(self, name: str | None) -> int:
        if name is None or name not in self.names:
            self.names.append(name)
            self.blocks.append(Block())
            return len(self.blocks) - 1
        return self.names.index(name)

    def segment(
        self, block: int, first: int, rows: int, parts: Sequence[Tensor | Stored]
    ) -> Segment:
        placed = [p if isinstance(p, Tensor) else (p, self.blocks[block].add(p)) for p in parts]
        return Segment(first, rows, block, tuple(placed))
