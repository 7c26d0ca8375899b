"""What frozen layers give for every row, kept: in memory up to its share, the rest in a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from inlay.memory.devices import available_memory

SHARE_OF_MEMORY = 0.5
"""The part of the free memory that features may take; what lies over it goes to the file."""
FULL, LOW = 1e-4, 0.05
"""How far logits from kept features may be from the model's own, relative to the largest."""


@dataclass(frozen=True)
class InFile:
    """A tensor that lies in a file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        count = int(torch.Size(self.shape).numel())
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = bytearray(file.read(count * self.dtype.itemsize))
        return torch.frombuffer(content, dtype=self.dtype).view(self.shape)


Kept = Tensor | InFile
Reason = TypeVar("Reason", str, str | None)


def in_memory(tensor: Kept) -> Tensor:
    return tensor.read() if isinstance(tensor, InFile) else tensor


class FeatureCache(ABC):
    """Features that a model reads in place of running the layers that make them."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.path = path
        self.left = int(SHARE_OF_MEMORY * available_memory())
        self.bytes_in_memory = self.bytes_in_file = 0

    def where(self) -> str:
        """Return how much is kept in memory and in the file."""
        parts = [f"{self.bytes_in_memory / 1e6:.1f} MB in memory"] if self.bytes_in_memory else []
        parts += [f"{self.bytes_in_file / 1e6:.1f} MB in {self.path}"] if self.bytes_in_file else []
        return ", ".join(parts)

    def keep(self, tensor: Tensor) -> Kept:
        size = tensor.numel() * tensor.itemsize
        if size <= self.left:
            self.left -= size
            self.bytes_in_memory += size
            return tensor.cpu().clone()
        flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
        with self.path.open("ab") as file:
            file.write(flat.numpy().tobytes())
        self.bytes_in_file += size
        return InFile(self.path, self.bytes_in_file - size, tensor.dtype, tuple(tensor.shape))

    @abstractmethod
    def reading(self) -> AbstractContextManager[None]:
        """Let the model read features from here inside the `with` block."""

    @abstractmethod
    def forget(self) -> None:
        """Give up the features in memory."""

    def refused(self, reason: Reason) -> Reason:
        """Return why the cache cannot be used, if it cannot; its file is then removed."""
        if reason is not None:
            self.forget()
            self.path.unlink(missing_ok=True)
        return reason

    @contextmanager
    def used(self) -> Generator[None]:
        """Let the model read features from here, then give up their memory and their file."""
        try:
            with self.reading():
                yield
        finally:
            self.forget()
            self.path.unlink(missing_ok=True)


def off_by(read: Tensor, own: Tensor) -> str | None:
    """Return how far logits from kept features are from the model's own, if too far."""
    difference = float((read - own).abs().max() / own.abs().max())
    if difference <= (FULL if own.dtype in (torch.float32, torch.float64) else LOW):
        return None
    return f"logits computed from kept features would be off by {difference:.1%}"
