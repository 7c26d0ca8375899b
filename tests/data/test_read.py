from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from inlay.data.raw import RawRow
from inlay.data.read import read_rows
from inlay.errors import DataError

ROWS = [{"prompt": "Hé?", "completion": "a"}, {"prompt": "two\nlines", "completion": 'b, "c"'}]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(rows: list[RawRow]) -> list[dict[str, object]]:
    return [row.values for row in rows]


CSV = 'prompt,completion\nHé?,a\n"two\nlines","b, ""c"""\n'
FILES = {
    "a.jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n",
    "a.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "a.csv": CSV,
    "a.tsv": CSV.replace("prompt,completion", "prompt\tcompletion")
    .replace("Hé?,a", "Hé?\ta")
    .replace('","', '"\t"'),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, bom: bytes) -> None:
    path = written(tmp_path / name, bom + FILES[name].encode())
    assert values(read_rows(path)) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_windows_line_ends_change_nothing(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, FILES[name].replace("\n", "\r\n"))
    assert values(read_rows(path)) == ROWS


def test_windows_line_ends_of_a_csv_stay_out_of_the_fields(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "a,b\r\n1,2\r\n")
    assert values(read_rows(path)) == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize("above", ["", "sep=;\n", "sep=;\r\n"])
@pytest.mark.parametrize("between", [";", "\t"])
def test_a_tables_header_shows_what_stands_between_fields(
    tmp_path: Path, above: str, between: str
) -> None:
    text = 'findings;impression\n1,5 cm;a\n"b; \nc";"d, e"\n'.replace(";", between)
    above = above.replace(";", between)
    rows = read_rows(written(tmp_path / "a.csv", above + text))
    assert values(rows) == [
        {"findings": "1,5 cm", "impression": "a"},
        {"findings": f"b{between} \nc", "impression": "d, e"},
    ]
    assert [row.line for row in rows] == ([3, 4] if above else [2, 3])


@pytest.mark.parametrize("header", ["a,b;c", '"a;b",c', "a;b,c\td"])
def test_a_comma_in_the_header_is_the_separator(tmp_path: Path, header: str) -> None:
    [row] = read_rows(written(tmp_path / "a.csv", f"{header}\n1,2\n"))
    assert list(row.values.values()) == ["1", "2"]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert values(rows) == ROWS
    assert rows[1].where.endswith("a.parquet, row 2")


def test_lines_are_where_the_rows_start(tmp_path: Path) -> None:
    text = 'a\n\n"1\n2"\n3\n'
    assert [r.line for r in read_rows(written(tmp_path / "a.csv", text))] == [3, 5]
    text = '[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]'
    assert [r.line for r in read_rows(written(tmp_path / "a.json", text))] == [2, 4, 5]
    text = '{"a": 1}\n\n{"a": "\u2028"}\n'
    assert [r.line for r in read_rows(written(tmp_path / "a.jsonl", text))] == [1, 3]


@pytest.mark.parametrize("name", ["A.CSV", "A.Json"])
def test_an_ending_in_capitals_is_the_same_format(tmp_path: Path, name: str) -> None:
    rows = read_rows(written(tmp_path / name, FILES[f"a.{name[2:].lower()}"]))
    assert values(rows) == ROWS
    assert f"{name}, line 2" in rows[0].where


def test_a_field_of_a_csv_may_be_long(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "a\n" + "x" * 200_000 + "\n")
    assert len(read_rows(path)[0].values["a"]) == 200_000


BAD: list[tuple[str, str | bytes, str]] = [
    ("e.jsonl", "", "holds no rows"),
    ("e.json", "", "holds no rows"),
    ("e.json", "[]", "holds no rows"),
    ("e.csv", "", "holds no rows"),
    ("e.csv", "a,b\n", "holds no rows"),
    ("e.jsonl", "\n \n", "holds no rows"),
    ("u.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"u\.jsonl, line 2: byte 0xe9 \(byte 17 "),
    ("u.csv", "a\né\n".encode("utf-16"), "UTF-16"),
    ("s.jsonl", '{"a": 1}\n{"a": 1,}\n', "line 2: not JSON"),
    ("s.jsonl", '{"a": 1} {"a": 2}\n', "line 1: not JSON: more follows"),
    ("s.jsonl", '{"a": 1, "a": 2}', "line 1: the key 'a' stands twice"),
    ("s.jsonl", "[" * 100_000, "line 1: the JSON is nested too deeply"),
    ("s.jsonl", '{"a": ' + "1" * 5000 + "}", "line 1: "),
    ("s.jsonl", '"text"', "line 1: a row must be an object"),
    ("s.json", '[{"a": 1},\n{"a": }]', "line 2: not JSON"),
    ("s.json", '[{"a": 1},\n{"a": 2}\n', "line 3: not JSON"),
    ("s.json", '[{"a": 1}]\nx', "not JSON"),
    ("s.json", '[{"a": 1},]', "line 1: not JSON"),
    ("s.json", '\n{"a": 1}\n{"a": 2}', "line 2: expected a list of rows.*jsonl"),
    ("s.json", "[1]", "line 1: a row must be an object"),
    ("r.csv", "a,b\n1,2\n1\n", "line 3: 1 fields, but the header has 2 columns"),
    ("r.csv", "a,b\n1,2,3\n", "line 2: 3 fields, but the header has 2 columns"),
    ("r.csv", "a,a\n1,2\n", "line 1: the column 'a' stands twice"),
    ("r.csv", "a,\n1,2\n", "line 1: column 2 of the header has no name"),
    ("r.csv", 'a\n1\n"open\n', "line 3: malformed row"),
    ("p.parquet", b"PAR1 nothing", "not a sound parquet file"),
    ("x.txt", "hello", r"unknown format \(\.txt\); expected .jsonl"),
    ("x", "hello", r"unknown format \(no ending\)"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_bad_file_is_one_sentence(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        read_rows(written(tmp_path / name, content))
    assert name in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no file .*trian\.jsonl.* Did you mean 'train\.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"no file .*folder is not there"):
        read_rows("nowhere/train.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)


def test_a_hub_id_is_loaded_and_a_failure_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> Dataset:
        asked.append((name, split))
        if split == "none":
            raise ConnectionError("no\nnetwork")
        return Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    rows = read_rows("owner/name")
    assert (rows[0].values, rows[0].where) == ({"text": "a"}, "owner/name:train, row 1")
    read_rows("owner/name:test")
    read_rows("owner/name", split="dev[:10]")
    assert asked == [("owner/name", s) for s in ("train", "test", "dev[:10]")]
    with pytest.raises(DataError, match=r"'owner/name'.*ConnectionError: no network"):
        read_rows("owner/name:none")


def test_the_reports_are_built_in() -> None:
    rows = read_rows("reports")
    assert len(rows) >= 2000
    assert set(rows[0].values) == {"uid", "findings", "impression", "label", "prompt", "completion"}
    assert rows[4].where == "reports, row 5"


def test_reading_does_not_import_torch() -> None:
    code = (
        "import sys, inlay.data.read, inlay.data.rows, inlay.data.split, inlay.data.tokens;"
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
