"""Damaged files: rows that are whole, or one sentence."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inlay.data.read import read_rows
from inlay.data.rows import Rows, normalise
from inlay.errors import DataError

PAIRS = [{"prompt": f"Fräge {i}", "completion": 'a, "b"\nc', "n": i} for i in range(3)]
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"messages": [{"role": "user", "content": "Ha"}, {"role": "assistant", "content": "He"}]},
]


def as_parquet(rows: list[dict[str, object]]) -> bytes:
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, buffer, compression="none", write_page_checksum=True)
    return buffer.getvalue()


FILES: dict[str, bytes] = {
    "pairs.jsonl": "\n".join(json.dumps(row) for row in PAIRS).encode(),
    "chats.jsonl": "\n".join(json.dumps(row) for row in CHATS).encode(),
    "pairs.json": json.dumps(PAIRS, ensure_ascii=False, indent=1).encode(),
    "pairs.csv": 'prompt,completion\nFräge,"a, ""b""\nc"\nWhy,so\n'.encode(),
    "pairs.parquet": as_parquet(list(PAIRS)),
    "chats.parquet": as_parquet(list(CHATS)),
}
TOKENS = [b"", b"\n", b"\r", b"\x00", b'"', b",", b"{", b"}", b"[", b"]", b"null", b"NaN", b"1e999"]
TOKENS += [b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b"-", b"0", b"\xe2\x80\xa8", b"\x85"]
pieces = st.one_of(st.sampled_from(TOKENS), st.binary(max_size=4))


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few stretches replaced, or cut short."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 6)))
        content = content[:start] + draw(pieces) + content[end:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


def rows_or_sentence(path: Path, skip_empty: bool) -> Rows | str:
    try:
        return normalise(read_rows(path), skip_empty=skip_empty)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("name", FILES)
@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_damaged_file_is_rows_or_a_sentence(
    name: str, data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data.draw(damage(FILES[name])))
    skip = data.draw(st.booleans())
    rows = rows_or_sentence(path, skip)
    if isinstance(rows, str):
        assert name in rows
        return
    assert len(rows) == len(rows.lines) > 0
    for row in rows.rows:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
