"""A row as it was found in a file, and the text of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.errors import DataError

TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class RawRow:
    """One row as it was found: its columns, and where it stands."""

    values: dict[str, Any]
    source: str
    line: int
    """From 1: the line it starts on in a text file, else the row's number."""

    @property
    def where(self) -> str:
        """`data.csv, line 3`, the start of every error about this row."""
        return place(self.source, self.line)


def place(source: str, line: int) -> str:
    """Return `data.csv, line 3`, or `row 3` where the source has no lines."""
    return f"{source}, {'line' if source.lower().endswith(TEXT_FORMATS) else 'row'} {line}"


def decoded(path: Path) -> str:
    """Return a file's text without a byte order mark."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16, not UTF-8; save it as UTF-8")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} (byte {error.start + 1} of "
            "the file) is not UTF-8; save the file as UTF-8"
        ) from error
