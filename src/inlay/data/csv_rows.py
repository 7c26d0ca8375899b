"""Rows of tables in text, separated by commas, semicolons or tabs."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from inlay.data.raw import RawRow, decoded
from inlay.errors import DataError

SEPARATOR = "sep="
"""What Excel writes before the separator, above a table's header."""


def read_csv(path: Path) -> Iterator[RawRow]:
    """Yield the rows below a header; a quoted field may span lines."""
    csv.field_size_limit(sys.maxsize)
    text = decoded(path)
    delimiter = delimiter_of(path, text)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in lines:
            if fields and header is None and fields[0].lower() != SEPARATOR:
                header = checked_header(fields, path, start)
            elif fields and header is not None:
                yield csv_row(header, fields, path, start)
            start = lines.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: malformed row: {error}") from error


def delimiter_of(path: Path, text: str) -> str:
    """Return what stands between a table's fields: as its header shows, or Excel's `sep=;` says."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = next((line for line in text.splitlines() if line.strip()), "")
    if first.lower().startswith(SEPARATOR) and len(first) == len(SEPARATOR) + 1:
        return first[-1]
    for delimiter in ",;\t":
        with suppress(csv.Error):
            if len(next(csv.reader([first], delimiter=delimiter, strict=True))) > 1:
                return delimiter
    return ","


def checked_header(names: list[str], path: Path, line: int) -> list[str]:
    """Return the column names."""
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise DataError(f"{path}, line {line}: column {number} of the header has no name")
        if names.count(name) > 1:
            raise DataError(f"{path}, line {line}: the column {name!r} stands twice in the header")
    return names


def csv_row(header: list[str], fields: list[str], path: Path, line: int) -> RawRow:
    """Return a line's fields by column."""
    if len(fields) != len(header):
        raise DataError(
            f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)} columns; "
            "put quotes around a field that contains the separator"
        )
    return RawRow(dict(zip(header, fields, strict=True)), str(path), line)
