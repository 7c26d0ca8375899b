"""The cases of `steps.py`: shapes, storages of the frozen weights, lengths."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One comparison: a shape, a storage of the frozen weights, and a length."""

    shape: str
    storage: str
    tokens: int
    layers: int | None = None
    vocab: int | None = None

    @property
    def name(self) -> str:
        """The name in the results."""
        return f"{self.shape} {self.storage} {self.tokens}"


QUICK = [Case("0.5B", storage, 512) for storage in ("bf16", "nf4")]
FULL = [
    *QUICK,
    *(Case("0.5B", storage, 128) for storage in ("bf16", "nf4")),
    *(Case("1.5B", s, tokens, layers=7) for tokens in (128, 512) for s in ("bf16", "nf4")),
    *(Case("0.5B", storage, 2048, layers=6) for storage in ("bf16", "nf4")),
    *(Case("1.5B", storage, 2048, layers=3) for storage in ("bf16", "nf4")),
]
"""Fewer layers are used where all contestants together would not fit in 24 GB of memory."""
SMOKE = [Case("tiny", storage, 32) for storage in ("bf16", "nf4")]
