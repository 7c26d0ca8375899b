from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from inlay.data.preference import normalise_pairs, side_of
from inlay.data.read import read_rows
from inlay.data.rows import Rows
from inlay.data.split import split
from inlay.data.text_reader import TextReader
from inlay.errors import DataError
from inlay.model.load.folder import EMBEDDED
from inlay.tasks.dpo.pairs import Pair, encode_pairs

GOOD = {"prompt": "Say a colour:", "chosen": "red", "rejected": "blue and green"}
ASKED = [{"role": "user", "content": "A colour?"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED["pocket"])


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> Rows:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return normalise_pairs(read_rows(path), **options)


def trained(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text of each side that counts."""
    texts = [
        tokenizer.decode([i for i, t in zip(s.input_ids, s.trained, strict=True) if t])
        for s in (pair.chosen, pair.rejected)
    ]
    return str(texts[0]), str(texts[1])


def test_texts_meet_at_a_tokens_boundary_as_supervised_rows_do(tmp_path: Path):
    assert read(tmp_path, GOOD).rows == [
        {"prompt": "Say a colour:", "chosen": " red", "rejected": " blue and green"}
    ]
    spaced = {"prompt": "Q\n", "chosen": " x", "rejected": " y"}
    assert read(tmp_path, spaced).rows == [spaced]


def test_a_table_holds_pairs_too(tmp_path: Path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected\n"Q, and?",a,b\n')
    (row,) = normalise_pairs(read_rows(path)).rows
    assert row == {"prompt": "Q, and?", "chosen": " a", "rejected": " b"}


def test_conversations_whole_or_beside_their_prompt_are_the_same(tmp_path: Path):
    whole = {"chosen": [*ASKED, said("red")], "rejected": [*ASKED, said("no")]}
    beside = {"prompt": ASKED, "chosen": [said("red")], "rejected": [said("no")]}
    expected = {"prompt": ASKED, "chosen": "red", "rejected": "no"}
    assert read(tmp_path, whole).rows == read(tmp_path, beside).rows == [expected]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "q", "chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "q", "choosen": "a", "rejected": "b"}, "Did you mean 'choosen'?"),
        ({"chosen": "a", "rejected": "b"}, "no field 'prompt'"),
        ({**GOOD, "chosen": "  "}, "'chosen' is blank"),
        ({**GOOD, "prompt": None}, "'prompt' is null"),
        ({**GOOD, "rejected": 3}, "'rejected' is of type int; expected text"),
        ({**GOOD, "rejected": " red "}, "'chosen' and 'rejected' are the same"),
        ({**GOOD, "rejected": " blue"}, "begins with white space and the other does not"),
        ({**GOOD, "score": 3}, "the field 'score' is not one of a preference"),
        ({**GOOD, "chosen": [said("a")]}, "'chosen' is of type list, but"),
    ],
)
def test_a_wrong_row_is_a_sentence_with_file_and_line(
    tmp_path: Path, row: dict[str, Any], sentence: str
):
    with pytest.raises(DataError) as caught:
        read(tmp_path, GOOD, row)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'pairs.jsonl'}, line 2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": ASKED, "chosen": [], "rejected": [said("b")]}, "'chosen' holds no messages"),
        ({"prompt": ASKED, "chosen": ASKED, "rejected": [said("b")]}, "it adds 'user'"),
        (
            {"prompt": ASKED, "chosen": [said("a"), *ASKED], "rejected": [said("b")]},
            "it adds 'assistant', 'user'",
        ),
        (
            {"prompt": [said("a")], "chosen": [said("a")], "rejected": [said("b")]},
            "the prompt must end in a message of 'user'",
        ),
        (
            {"chosen": [*ASKED, said("a")], "rejected": [said("c"), said("b")]},
            "part at message 1",
        ),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "the prompt must end"),
        (
            {"prompt": ASKED, "chosen": [{"role": "gpt", "content": "a"}], "rejected": [said("b")]},
            "message 1 has the unknown role 'gpt'",
        ),
        ({"prompt": ASKED, "chosen": [said("a")], "rejected": [said(" a ")]}, "are the same"),
        ({"prompt": "q", "chosen": [said("a")], "rejected": [said("b")]}, "must be a list"),
    ],
)
def test_a_wrong_conversation_is_a_sentence(tmp_path: Path, row: dict[str, Any], sentence: str):
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 1: ") as caught:
        read(tmp_path, row)
    assert sentence in str(caught.value)


def test_empty_rows_are_left_out_only_when_asked(tmp_path: Path):
    found = read(tmp_path, GOOD, {**GOOD, "chosen": ""}, skip_empty=True)
    assert (found.lines, found.skipped) == ([1], [2])


def test_rows_of_one_prompt_stay_on_one_side_of_a_split(tmp_path: Path):
    rows = [{"prompt": f"q{i // 5}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(50)]
    parts = split(read(tmp_path, *rows), (0.5, 0.25, 0.25))
    prompts = [{row["prompt"] for row in part.rows} for part in parts]
    assert sum(len(part) for part in parts) == 50
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 10


def test_a_group_column_may_stand_beside_the_three(tmp_path: Path):
    found = read(tmp_path, {**GOOD, "patient": 7}, group="patient")
    assert found.groups == ["7"]


# Tokens


def test_only_the_answers_count_and_both_sides_share_the_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    (pair,) = encode_pairs(read(tmp_path, GOOD), TextReader(tokenizer), 64)
    assert trained(pair, tokenizer) == (" red<|end|>", " blue and green<|end|>")
    assert pair.chosen.input_ids[: pair.start] == pair.rejected.input_ids[: pair.start]
    assert str(tokenizer.decode(pair.chosen.input_ids[: pair.start])) == GOOD["prompt"]
    assert pair.length == len(pair.rejected.input_ids) > len(pair.chosen.input_ids)
    assert pair.chosen.ends


def test_of_a_conversation_only_the_last_answer_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    turns = [*ASKED, said("black"), {"role": "user", "content": "Another?"}]
    row = {"prompt": turns, "chosen": [said("red")], "rejected": [said("no")]}
    (pair,) = encode_pairs(read(tmp_path, row), TextReader(tokenizer), 64)
    assert trained(pair, tokenizer) == ("red<|end|>", "no<|end|>")


def test_a_prompt_that_fills_the_row_is_a_sentence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    rows = read(tmp_path, GOOD, {**GOOD, "prompt": "Say a colour and then another colour:"})
    with pytest.raises(DataError, match=r"line 2: the prompt fills all 8 tokens.*max_length \d+"):
        encode_pairs(rows, TextReader(tokenizer), 8)


def test_answers_that_are_cut_to_the_same_are_a_sentence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    rows = read(tmp_path, {"prompt": "q", "chosen": "a b c d e f", "rejected": "a b c d e g"})
    whole = encode_pairs(rows, TextReader(tokenizer), 64)[0].chosen.input_ids
    with pytest.raises(DataError, match=r"'chosen' and 'rejected' are the same; .* max_length"):
        encode_pairs(rows, TextReader(tokenizer), len(whole) - 2)
    (pair,) = encode_pairs(rows, TextReader(tokenizer), len(whole) - 1)
    assert not pair.chosen.ends
    assert pair.chosen.truncated


def test_a_side_is_a_supervised_row(tmp_path: Path):
    rows = read(tmp_path, GOOD)
    assert side_of(rows, "rejected").rows == [
        {"prompt": "Say a colour:", "completion": " blue and green"}
    ]
    talk = read(tmp_path, {"prompt": ASKED, "chosen": [said("a")], "rejected": [said("b")]})
    assert side_of(talk, "chosen").rows == [{"messages": [*ASKED, said("a")], "completion": "a"}]
