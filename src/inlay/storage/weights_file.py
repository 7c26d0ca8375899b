"""Tensors of safetensors files, read piece by piece, past the kernel's cache where it allows."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.errors import StorageError
from inlay.storage.buffers import ALIGNMENT, aligned, rounded_up
from inlay.storage.dtypes import FLOATING, INTEGERS

AT_ONCE = 8 << 20
"""Bytes of one read: few, so that a thread ends soon after it is closed."""


class WeightsFile:
    """One open safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.whole = opened(path, 0)
        try:
            self.direct = opened(path, os.O_DIRECT)
        except OSError:
            self.direct = opened(path, 0)
        weakref.finalize(self, close, self.whole, self.direct)

    def tensors(self) -> dict[str, FileTensor]:
        """Return every tensor by name; raise `StorageError` for a damaged or truncated file."""
        size = os.fstat(self.whole).st_size
        try:
            length = int.from_bytes(os.pread(self.whole, 8, 0), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(os.pread(self.whole, length, 8))
            header.pop("__metadata__", None)
            found = {k: self.tensor(k, 8 + length, **said) for k, said in header.items()}
            end = max((t.offset + t.nbytes for t in found.values()), default=0)
            if end > size:
                raise ValueError(f"its tensors need {end} bytes, it has {size}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{self.path} is truncated or damaged: {error}") from error
        return found

    def tensor(
        self, name: str, start: int, dtype: str, shape: list[int], data_offsets: list[int]
    ) -> FileTensor:
        found = FileTensor(
            self, name, start + data_offsets[0], (FLOATING | INTEGERS)[dtype], tuple(shape)
        )
        if found.nbytes != data_offsets[1] - data_offsets[0]:
            raise ValueError(f"the bytes of {name} do not fit its shape {shape}")
        return found

    def read(self, descriptor: int, into: Tensor, offset: int, needed: int) -> None:
        """Read at `offset` into (n,) uint8; raise `StorageError` for less than `needed` bytes."""
        view, got = into.numpy().data, 0
        while got < needed:
            try:
                count = os.preadv(descriptor, [view[got : got + AT_ONCE]], offset + got)
            except OSError as error:
                raise StorageError(f"{self.path} cannot be read: {error}") from error
            got += count
            size = os.fstat(descriptor).st_size
            if got < needed and offset + got >= size:
                raise StorageError(
                    f"{self.path} ends at byte {size}, but a weight lies up to byte "
                    f"{offset + needed}: it was cut short while the model was in use. Restore "
                    "the file, or delete its folder if it is in a cache, and load the model again"
                )


@dataclass(frozen=True)
class FileTensor:
    """Where one tensor lies; a piece for the buffers."""

    file: WeightsFile
    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        return rounded_up(self.offset % ALIGNMENT + self.nbytes)

    def fill(self, room: Tensor) -> None:
        start = self.offset % ALIGNMENT
        file = self.file
        file.read(file.direct, room, self.offset - start, start + self.nbytes)
        os.posix_fadvise(file.direct, self.offset, self.nbytes, os.POSIX_FADV_DONTNEED)

    def found_in(self, room: Tensor) -> Tensor:
        start = self.offset % ALIGNMENT
        return room[start : start + self.nbytes].view(self.dtype).view(self.shape)

    def seen_as(self, dtype: torch.dtype, shape: tuple[int, ...]) -> FileTensor:
        """Return the same bytes as another dtype and shape; else raise `StorageError`."""
        found = FileTensor(self.file, self.name, self.offset, dtype, shape)
        if found.nbytes != self.nbytes or self.offset % dtype.itemsize:
            raise StorageError(
                f"{self.name} in {self.file.path} is {self.dtype} of shape {self.shape} at byte "
                f"{self.offset}, which cannot be read as {dtype} of shape {shape}"
            )
        return found

    def rows(self, first: int, last: int) -> FileTensor:
        each = self.nbytes // self.shape[0]
        shape = (last - first, *self.shape[1:])
        return FileTensor(self.file, self.name, self.offset + first * each, self.dtype, shape)

    def take(self, rows: Tensor) -> Tensor:
        """Return those rows, read one by one; rows: (n,) integers on the host."""
        each = self.nbytes // self.shape[0]
        found = torch.empty(rows.numel(), *self.shape[1:], dtype=self.dtype)
        places = found.view(torch.uint8).view(rows.numel(), each)
        for place, row in zip(places, rows.tolist(), strict=True):
            self.file.read(self.file.whole, place, self.offset + row * each, each)
        return found

    def load(self) -> Tensor:
        room = aligned(self.room)
        self.fill(room)
        return self.found_in(room).clone()


@dataclass(frozen=True)
class HostTensor:
    """One tensor in host memory; a piece for the buffers."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def room(self) -> int:
        return rounded_up(self.nbytes)

    def fill(self, room: Tensor) -> None:
        room[: self.nbytes].copy_(self.tensor.reshape(-1).view(torch.uint8))

    def found_in(self, room: Tensor) -> Tensor:
        return room[: self.nbytes].view(self.dtype).view(self.shape)

    def rows(self, first: int, last: int) -> HostTensor:
        return HostTensor(self.tensor[first:last])

    def take(self, rows: Tensor) -> Tensor:
        return self.tensor[rows]

    def load(self) -> Tensor:
        return self.tensor


Stored = FileTensor | HostTensor


def opened(path: Path, flags: int) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)


def close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
