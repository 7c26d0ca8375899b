from __future__ import annotations

import json
import math
from typing import Any

import pytest

from inlay.data.raw import RawRow
from inlay.data.read import read_rows
from inlay.data.rows import Rows, normalise
from inlay.data.split import split
from inlay.errors import DataError


def raw(*rows: dict[str, Any]) -> list[RawRow]:
    return [RawRow(values, "d.jsonl", line) for line, values in enumerate(rows, start=1)]


USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}


def test_each_format_is_recognised() -> None:
    assert normalise(raw({"text": "a"})).rows == [{"text": "a"}]
    pair = normalise(raw({"prompt": "Q:", "completion": "A", "id": 1}))
    assert (pair.kind, pair.rows) == ("prompt_completion", [{"prompt": "Q:", "completion": " A"}])
    chat = normalise(raw({"messages": [USER, ANSWER]}))
    assert (chat.kind, chat.rows) == ("messages", [{"messages": [USER, ANSWER]}])
    told = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert normalise(raw({"conversations": told})).rows == chat.rows
    assert normalise(raw({"conversations": [USER, ANSWER]})).rows == chat.rows
    assert normalise(raw({"messages": json.dumps([USER, ANSWER])})).rows == chat.rows
    system = normalise(raw({"conversations": told, "system": "Be kind."})).rows[0]["messages"][0]
    assert system == {"role": "system", "content": "Be kind."}


def test_alpaca_has_the_published_prompt_with_and_without_input() -> None:
    rows = normalise(
        raw(
            {"instruction": "Add.", "input": "1 1", "output": "2", "text": "x"},
            {"instruction": "Wave.", "input": "", "output": "o/"},
        )
    ).rows
    assert "### Input:\n1 1\n\n### Response:\n" in rows[0]["prompt"]
    assert "Input" not in rows[1]["prompt"]
    assert rows[1]["completion"] == "o/"


def test_any_two_columns_and_templates() -> None:
    data = raw({"q": "Why?", "a b": "So.", "n": 1})
    assert normalise(data, prompt="q", completion="a b").rows == [
        {"prompt": "Why?", "completion": " So."}
    ]
    made = normalise(data, prompt="Q: {q} {{x}}\nA:", completion="{a b}")
    assert made.rows == [{"prompt": "Q: Why? {x}\nA:", "completion": " So."}]
    assert normalise(data, text="{q}|{a b}").rows == [{"text": "Why?|So."}]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q:", "A", ("Q:", " A")),
        ("Q: ", "A", ("Q:", " A")),
        ("Q:\n", "A", ("Q:\n", "A")),
        ("Q:", "\nA", ("Q:", "\nA")),
        ("Q:", " A", ("Q:", " A")),
    ],
)
def test_prompt_and_completion_meet_at_one_space(
    prompt: str, completion: str, expected: tuple[str, str]
) -> None:
    row = normalise(raw({"prompt": prompt, "completion": completion})).rows[0]
    assert (row["prompt"], row["completion"]) == expected


GOOD = {"prompt": "p", "completion": "c"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "p", "complettion": "c"}, r"no field 'completion'.*Did you mean 'complettion'"),
    ({"prompt": "p", "completion": 3}, "'completion' is of type int; expected text"),
    ({"prompt": "p", "completion": ["c"]}, "'completion' is of type list"),
    ({"prompt": "p", "completion": " \n"}, "'completion' is blank.*skip_empty"),
    ({"prompt": None, "completion": "c"}, "'prompt' is null"),
    ({"prompt": "p", "completion": math.nan}, "'completion' is null"),
    ({"prompt": "p", "completion": "\ud800"}, "'completion' holds half of a surrogate pair"),
    ({"messages": [USER, ANSWER]}, "format 'messages', but d.jsonl, line 1 has 'prompt_comple"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_stops_with_file_and_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^d\.jsonl, line 2: .*{message}"):
        normalise(raw(GOOD, row))


BAD_CHATS: list[tuple[Any, str]] = [
    ([], "holds no messages"),
    ("hello", "must be a list of objects"),
    ([1], "must be a list of objects"),
    ([USER], "no message is of 'assistant'"),
    ([USER, USER, ANSWER], "messages 1 and 2 are both of 'user'"),
    ([USER, {"role": "asistant", "content": "x"}], "message 2 has the unknown role.*Did you mean"),
    ([USER, {"role": 3, "content": "x"}], "message 2 has the unknown role 3"),
    ([USER, {"role": "assistant"}], "message 2 has no 'content'"),
    ([USER, {"role": "assistant", "content": ""}], "'content' of message 2 is blank"),
    ([USER, {"role": "assistant", "content": [1]}], "'content' of message 2 is of type list"),
    ([USER, ANSWER | {"tool_calls": [{}]}], "message 2 has 'tool_calls'"),
    ([USER, ANSWER, {"role": "system", "content": "x"}], "message 3 is of 'system'"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_CHATS)
def test_a_bad_conversation_stops_with_file_and_line(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^d\.jsonl, line 1: .*{message}"):
        normalise(raw({"messages": messages}))


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(DataError, match="Alpaca's prompt has no 'history'"):
        normalise(raw({"instruction": "a", "output": "b", "history": [["x", "y"]]}))
    with pytest.raises(DataError, match="tools are not supported"):
        normalise(raw({"messages": [USER, ANSWER], "tools": [{}]}))


def test_wrong_columns_and_templates() -> None:
    data = raw({"findings": "f", "impression": "i"})
    with pytest.raises(DataError, match=r"the columns 'findings', 'impression' are of no known"):
        normalise(data)
    with pytest.raises(DataError, match="Did you mean 'findings'"):
        normalise(data, prompt="finding", completion="impression")
    with pytest.raises(DataError, match=r"no field 'finding'.*Did you mean 'findings'"):
        normalise(data, prompt="F: {finding}", completion="impression")
    for template in ("{{findings}}", "{findings", "{}", "{findings!r}", "{findings:>3}"):
        with pytest.raises(DataError, match="the template"):
            normalise(data, prompt=template, completion="impression")
    with pytest.raises(DataError, match="name the completion column too"):
        normalise(data, prompt="findings")
    with pytest.raises(DataError, match="exclude each other"):
        normalise(data, prompt="findings", completion="impression", text="findings")
    with pytest.raises(DataError, match=r"unknown data format 'alpacca'.*Did you mean 'alpaca'"):
        normalise(data, format="alpacca")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="no rows"):
        normalise([])


def test_empty_rows_are_skipped_only_when_asked_and_then_listed() -> None:
    data = raw(GOOD, {"prompt": "p", "completion": ""}, {"prompt": None, "completion": "c"}, GOOD)
    rows = normalise(data, skip_empty=True)
    assert (len(rows), rows.lines, rows.skipped) == (2, [1, 4], [2, 3])
    with pytest.raises(DataError, match="line 2"):
        normalise(raw(GOOD, {"prompt": "p", "completion": 3}), skip_empty=True)
    with pytest.raises(DataError, match="all 1 rows have an empty field"):
        normalise(raw({"text": ""}), skip_empty=True)


def test_the_hash_is_of_the_raw_rows() -> None:
    one, same = (normalise(raw(GOOD)).sha256 for _ in range(2))
    assert one == same
    assert one != normalise(raw(GOOD | {"id": 1})).sha256


def reports() -> Rows:
    return normalise(read_rows("reports"), group="uid")


def test_a_split_is_complete_exact_and_repeatable() -> None:
    rows = reports()
    parts = split(rows, seed=3)
    assert [len(part) for part in parts] == [1920, 240, 240]
    assert sorted(line for part in parts for line in part.lines) == rows.lines
    assert split(rows, seed=3) == parts
    assert split(rows, seed=4) != parts


def test_a_group_is_never_parted() -> None:
    data = raw(*({"text": f"t{i}", "uid": i // 7} for i in range(210)))
    parts = split(normalise(data, group="uid"))
    groups = [set(part.groups or ()) for part in parts]
    assert all(not a & b for a in groups for b in groups if a is not b)
    assert all(part.lines for part in parts)


def test_equal_rows_are_never_parted() -> None:
    data = raw(*({"text": f"t{i % 20}"} for i in range(60)))
    parts = split(normalise(data))
    texts = [{row["text"] for row in part.rows} for part in parts]
    assert all(not a & b for a in texts for b in texts if a is not b)


def test_a_split_that_cannot_be_is_refused() -> None:
    rows = normalise(raw({"text": "a"}, {"text": "b"}))
    with pytest.raises(DataError, match="2 different rows are too few"):
        split(rows)
    with pytest.raises(DataError, match="add up to 1"):
        split(rows, (0.5, 0.2, 0.1))
    everything = split(rows, (1.0, 0.0, 0.0))
    assert [len(part) for part in everything] == [2, 0, 0]


@pytest.mark.parametrize("value", [None, "", math.nan, [1]])
def test_a_row_without_its_group_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl, line 1: the group 'uid' holds"):
        normalise(raw({"text": "a", "uid": value}), group="uid")
    with pytest.raises(DataError, match="no field 'uid'"):
        normalise(raw({"text": "a"}), group="uid")
