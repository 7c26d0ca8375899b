"""The functions that read and write adapter files, for an attached model's own methods.

The package `inlay.checkpoint` has them; it lies above this one, and `inlay` names it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn


class AdapterFiles(Protocol):
    def save_pretrained(
        self, model: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any
    ) -> None: ...
    def load_adapter(
        self, model: nn.Module, model_id: str | Path, *args: Any, **kwargs: Any
    ) -> None: ...
    def set_adapter(self, model: nn.Module, adapter_name: str | Sequence[str]) -> None: ...
    def restore(self, model: nn.Module, checkpoint: Path) -> bool: ...


provider: Callable[[], AdapterFiles]
"""Imports the package that has the functions and returns them; `inlay` sets it."""
