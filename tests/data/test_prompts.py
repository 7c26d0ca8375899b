from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.data.raw import RawRow
from inlay.data.read import read_rows
from inlay.data.split import split
from inlay.errors import DataError, ModelError
from inlay.model.load.folder import located
from inlay.model.load.tokenizer import read_tokenizer
from inlay.tasks.grpo.rows import are_prompts, encode_prompts, normalise_prompts

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}]


def raw(*rows: dict[str, Any]) -> list[RawRow]:
    return [RawRow(row, "data.jsonl", line) for line, row in enumerate(rows, start=1)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return read_tokenizer(located("pocket", None), trust_remote_code=False)


def test_every_further_column_is_kept_as_it_stands() -> None:
    rows = normalise_prompts(raw({"prompt": "a", "answer": 3, "tags": ["x", {"y": None}]}))
    assert rows.kind == "prompt"
    assert rows.rows == [{"prompt": "a", "answer": 3, "tags": ["x", {"y": None}]}]
    assert rows.where(0) == "data.jsonl, line 1"


def test_a_prompt_may_be_a_column_or_a_template() -> None:
    row = {"question": "1 + 1?", "answer": "#### 2"}
    by_column = normalise_prompts(raw(row), prompt="question")
    filled = normalise_prompts(raw(row), prompt="Question: {question}\nAnswer:")
    assert by_column.rows == [{**row, "prompt": "1 + 1?"}]
    assert filled.rows == [{**row, "prompt": "Question: 1 + 1?\nAnswer:"}]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_rows_of_every_format_are_the_same(ending: str, tmp_path: Path) -> None:
    import pandas as pd

    table = pd.DataFrame({"prompt": ["one?", "two?"], "answer": ["#### 1", "#### 2"]})
    path = tmp_path / f"rows.{ending}"
    match ending:
        case "parquet":
            table.to_parquet(path)
        case "csv" | "tsv":
            table.to_csv(path, index=False, sep="," if ending == "csv" else "\t")
        case _:
            table.to_json(path, orient="records", lines=ending == "jsonl")
    found = normalise_prompts(read_rows(path), needed={"answer": "final_number"})
    assert found.rows == table.to_dict("records")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"answer": "1"}], "line 1: no field 'prompt'; the row has 'answer'."),
        ([{"prompt": "a"}, {"prompt": " "}], "line 2: 'prompt' is blank"),
        ([{"prompt": "a"}, {"prompt": None}], "line 2: 'prompt' is null"),
        ([{"prompt": 3}], "line 1: 'prompt' is of type int; expected text"),
        ([{"prompt": "a"}, {"prompt": TALK}], "line 2: 'prompt' is of type list, but"),
        ([{"prompt": TALK}, {"prompt": "a"}], "line 2: 'prompt' is of type str, but"),
        ([{"prompt": []}], "line 1: 'prompt' holds no messages"),
        ([{"prompt": [{"role": "user"}]}], "line 1: message 1 has no 'content'"),
        (
            [{"prompt": [*TALK, {"role": "assistant", "content": "5"}]}],
            "line 1: the prompt must end in a message of 'user', which the model answers; it ends "
            "in one of 'assistant'",
        ),
    ],
)
def test_a_bad_prompt_is_named_with_its_line(rows: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        normalise_prompts(raw(*rows))
    assert f"data.jsonl, {sentence}" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "b"}, "line 2: no field 'answer'; the row has 'prompt'. The reward mine reads"),
        ({"prompt": "b", "answer": None}, "line 2: 'answer' is empty, and the reward mine reads"),
        ({"prompt": "b", "answer": ""}, "line 2: 'answer' is empty, and the reward mine reads it"),
    ],
)
def test_a_column_that_a_reward_reads_must_be_there(row: dict[str, Any], sentence: str) -> None:
    rows = raw({"prompt": "a", "answer": "1"}, row)
    with pytest.raises(DataError) as caught:
        normalise_prompts(rows, needed={"answer": "mine"})
    assert sentence in str(caught.value)
    assert len(normalise_prompts(rows)) == 2


def test_rows_with_an_empty_field_can_be_left_out() -> None:
    rows = raw({"prompt": "a", "answer": "1"}, {"prompt": ""}, {"prompt": "c", "answer": ""})
    found = normalise_prompts(rows, needed={"answer": "mine"}, skip_empty=True)
    assert (found.lines, found.skipped) == ([1], [2, 3])


def test_rows_of_one_prompt_stay_on_one_side_of_the_split() -> None:
    rows = normalise_prompts(raw(*({"prompt": f"p{i % 6}", "n": i} for i in range(60))))
    train, test = split(rows, (0.5, 0.5))
    both = {row["prompt"] for row in train.rows} & {row["prompt"] for row in test.rows}
    assert len(train) + len(test) == 60
    assert not both


def test_what_looks_like_a_prompt_has_what_its_rewards_read() -> None:
    (row,) = raw({"question": "q", "prompt": "p", "answer": "1"})
    assert are_prompts(row, None, ["answer"])
    assert not are_prompts(row, None, ["solution"])
    assert are_prompts(row, "Q: {question}", ["answer"])
    assert not are_prompts(row, "Q: {problem}", [])
    assert are_prompts(row, "question", [])
    assert not are_prompts(row, "problem", [])


# Tokens


def test_a_text_is_followed_by_its_answer_at_once(tokenizer: Any) -> None:
    rows = normalise_prompts(raw({"prompt": "Question: 1 + 1?\nAnswer:"}))
    (found,) = encode_prompts(rows, tokenizer, 64)
    assert tokenizer.decode(found.input_ids) == "Question: 1 + 1?\nAnswer:"
    assert not any(found.trained)


def test_messages_end_where_the_assistant_speaks(tokenizer: Any) -> None:
    rows = normalise_prompts(raw({"prompt": TALK}))
    (found,) = encode_prompts(rows, tokenizer, 64)
    wanted = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(found.input_ids) == wanted


def test_a_prompt_that_is_too_long_is_named_and_never_cut(tokenizer: Any) -> None:
    rows = normalise_prompts(raw({"prompt": "short"}, {"prompt": "word " * 50}))
    with pytest.raises(DataError, match=r"line 2: the prompt has \d+ tokens, more than max_length"):
        encode_prompts(rows, tokenizer, 20)
    longest = max(len(row.input_ids) for row in encode_prompts(rows, tokenizer, 1000))
    assert len(encode_prompts(rows, tokenizer, longest)) == 2


def test_messages_need_a_template_and_one_that_takes_them(tokenizer: Any) -> None:
    rows = normalise_prompts(raw({"prompt": TALK}))
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        with pytest.raises(ModelError, match="no chat template"):
            encode_prompts(rows, tokenizer, 64)
        tokenizer.chat_template = "{{ raise_exception('no system') }}"
        with pytest.raises(DataError, match="line 1: the model's chat template refuses"):
            encode_prompts(rows, tokenizer, 64)
    finally:
        tokenizer.chat_template = kept


def test_json_of_a_conversation_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"prompt": TALK, "answer": "#### 5"}))
    assert normalise_prompts(read_rows(path)).rows[0]["prompt"] == TALK
