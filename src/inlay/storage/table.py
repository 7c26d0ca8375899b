"""The table of storages, read from the source of their files: listing them imports no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inlay.declared import Declared, bases_of, classes_in, files_of

DENSE = "dense"
"""The storage of a weight that stays as it was loaded."""


@dataclass(frozen=True)
class StorageSpec(Declared):
    """A packed storage as its source describes it."""

    bytes_per_weight: float


@cache
def storages() -> Mapping[str, StorageSpec]:
    """Return every packed storage by the name users give it, the smallest first."""
    specs = [spec for path in files_of("storage") for spec in specs_in(path)]
    return {s.name: s for s in sorted(specs, key=lambda s: (s.bytes_per_weight, s.name))}


def specs_in(path: Path) -> Iterator[StorageSpec]:
    """Yield the storages that a file defines: subclasses of `QuantizedLinear` that name one."""
    text = path.read_text(encoding="utf-8")
    if "(QuantizedLinear)" not in text:
        return
    for node, values in classes_in(ast.parse(text)):
        if "QuantizedLinear" in bases_of(node) and isinstance(values.get("storage"), str):
            doc = ast.get_docstring(node) or ""
            bytes_per_weight = values["bytes_per_weight"]
            yield StorageSpec(values["storage"], node.name, path, doc, bytes_per_weight)


if TYPE_CHECKING:
    StorageName = str
else:
    StorageName = Literal[(DENSE, *storages())]
"""The type of a key or flag that names a storage."""
