"""Read rows from a file, a hub data set or the built-in data, each with its place of origin."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inlay.data.csv_rows import read_csv
from inlay.data.raw import RawRow, decoded
from inlay.errors import DataError, did_you_mean

DEMO = Path(__file__).with_name("demo")
BUILT_IN = {name: DEMO / f"{name}.jsonl.gz" for name in ("reports", "arithmetic")}
"""The data that comes with Inlay: radiology reports and arithmetic problems, both generated."""
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:+-]+))?")
WHITESPACE = re.compile(r"[ \t\r\n]*")


def read_rows(source: str | Path, *, split: str | None = None) -> list[RawRow]:
    """Return all rows of a file, of a hub data set `owner/name[:split]`, or of built-in data.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file, a hub id, `reports` or `arithmetic`.
        split: the split of a hub data set; `train` where neither this nor the id names one.

    Raises:
        DataError: it is not there, not readable, of no known format, malformed, or empty.
    """
    if str(source) in BUILT_IN:
        return read_built_in(str(source))
    path = Path(source)
    hub = None if is_meant_as_file(path) else HUB_ID.fullmatch(str(source))
    rows = read_hub(hub["name"], split or hub["split"] or "train") if hub else read_file(path)
    if not rows:
        raise DataError(f"{source} holds no rows; training needs at least one")
    return rows


def read_built_in(name: str) -> list[RawRow]:
    with gzip.open(BUILT_IN[name], "rt", encoding="utf-8") as lines:
        return [RawRow(json.loads(line), name, n) for n, line in enumerate(lines, start=1)]


def first_row(source: str | Path) -> RawRow:
    """Return the first row of a source, which may be far from whole in memory."""
    path = Path(source)
    if path.is_file() and path.suffix.lower() in READERS:
        for row in READERS[path.suffix.lower()](path):
            return row
    return read_rows(source)[0]


def is_meant_as_file(path: Path) -> bool:
    """Return whether the source names a file rather than a hub data set."""
    return path.exists() or path.suffix.lower() in READERS or path.parent.exists()


def read_file(path: Path) -> list[RawRow]:
    """Return all rows of a file."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one file: {known_formats()}")
    if not path.exists():
        raise DataError(f"there is no file {path}.{nearest_file(path)}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        shown = path.suffix or "no ending"
        raise DataError(f"{path} has an unknown format ({shown}); expected {known_formats()}")
    try:
        return list(reader(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def known_formats() -> str:
    return ", ".join(READERS)


def nearest_file(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix.lower() in READERS]
    except OSError:
        return " Its folder is not there either, or cannot be read."
    return did_you_mean(path.name, names)


# JSON


class RepeatedKeyError(ValueError):
    """A key that a JSON object holds twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; of two equal keys, one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {twice!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def decode_at(text: str, start: int, path: Path, line: int) -> tuple[Any, int]:
    """Return the JSON value that starts there, and where it ends."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line += text.count("\n", start, error.pos)
        raise DataError(f"{path}, line {line}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{path}, line {line}: the JSON is nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{path}, line {line}: {error}") from error


def after_space(text: str, start: int) -> int:
    """Return the index of the next character that is not JSON white space."""
    found = WHITESPACE.match(text, start)
    return found.end() if found else start


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """Yield a JSON object a line; blank lines are no rows."""
    for line, text in enumerate(decoded(path).split("\n"), start=1):
        start = after_space(text, 0)
        if start == len(text):
            continue
        value, end = decode_at(text, start, path, line)
        end = after_space(text, end)
        if end < len(text):
            raise DataError(f"{path}, line {line}: not JSON: more follows after the row's end")
        yield json_row(value, path, line)


def read_json(path: Path) -> Iterator[RawRow]:
    """Yield the objects of one JSON list, each with the line it starts on."""
    text = decoded(path)
    at = after_space(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        raise DataError(
            f"{path}, line {text.count(chr(10), 0, at) + 1}: expected a list of rows, [{{...}}, "
            "...]; for one row a line, name the file .jsonl"
        )
    counted, line = 0, 1
    at = after_space(text, at + 1)
    more = not text.startswith("]", at)
    while more:
        line, counted = line + text.count("\n", counted, at), at
        value, at = decode_at(text, at, path, line)
        yield json_row(value, path, line)
        at = after_space(text, at)
        more = text.startswith(",", at)
        at = after_space(text, at + 1) if more else at
    end = after_space(text, at + 1)
    if not text.startswith("]", at) or end < len(text):
        line = text.count("\n", 0, min(at, len(text))) + 1
        raise DataError(f"{path}, line {line}: not JSON: expected ',' or the end of the list")


def json_row(value: Any, path: Path, line: int) -> RawRow:
    """Return a JSON value as a row."""
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"{path}, line {line}: a row must be an object {{...}}, found a {kind}")
    return RawRow(value, str(path), line)


# Tables


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
        values = table.to_pylist(maps_as_pydicts="strict")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        message = " ".join(str(error).split())
        raise DataError(f"{path} is not a sound parquet file: {message}") from error
    return (RawRow(row, str(path), number) for number, row in enumerate(values, start=1))


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
"""How to read each format, by the file's ending."""


# Without a file


def read_hub(name: str, split: str) -> list[RawRow]:
    """Return the rows of a data set on the hub."""
    import datasets

    try:
        rows = undecoded(datasets.load_dataset(name, split=split))
        values = [dict(row) for row in rows]
    except Exception as error:  # any library below may fail in its own way; none may reach a user
        message = " ".join(str(error).split())
        raise DataError(
            f"there is no file {name}, and the hub data set {name!r} (split {split!r}) cannot be "
            f"loaded: {type(error).__name__}: {message}"
        ) from error
    return [RawRow(row, f"{name}:{split}", number) for number, row in enumerate(values, start=1)]


def undecoded(rows: Any) -> Any:
    """Return a data set whose images stay files' bytes until they are used."""
    import datasets

    def kept(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(kept(feature.feature), length=feature.length)
        if isinstance(feature, dict):
            return {name: kept(inner) for name, inner in feature.items()}
        return feature

    for name, feature in dict(rows.features).items():
        if kept(feature) != feature:
            rows = rows.cast_column(name, kept(feature))
    return rows
