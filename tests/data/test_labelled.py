from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from inlay.data.read import read_rows
from inlay.data.rows import Rows
from inlay.data.split import split
from inlay.data.text_reader import TextReader
from inlay.errors import DataError
from inlay.model.load.folder import EMBEDDED
from inlay.tasks.kto.mismatched import mismatched, mismatched_in_batches
from inlay.tasks.kto.rows import (
    Labelled,
    are_labelled,
    beside,
    by_label,
    desirable_of,
    encode_labelled,
    normalise_labelled,
)
from inlay.train.order import kept_order

GOOD = {"prompt": "Say a colour:", "completion": "red", "label": True}
BAD = {"prompt": "Say a colour:", "completion": "no", "label": False}
ASKED = [{"role": "user", "content": "A colour?"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED["pocket"])


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> Rows:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return normalise_labelled(read_rows(path), **options)


def trained(row: Labelled, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a row that counts."""
    both = zip(row.answer.input_ids, row.answer.trained, strict=True)
    return str(tokenizer.decode([i for i, counts in both if counts]))


def test_texts_meet_at_a_tokens_boundary_as_supervised_rows_do(tmp_path: Path):
    assert read(tmp_path, GOOD, BAD).rows == [
        {"prompt": "Say a colour:", "completion": " red", "label": True},
        {"prompt": "Say a colour:", "completion": " no", "label": False},
    ]


@pytest.mark.parametrize("ending", ["csv", "tsv", "CSV", "json", "jsonl", "parquet"])
def test_every_format_holds_labels(tmp_path: Path, ending: str):
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        table = pyarrow.Table.from_pylist([GOOD, BAD])
        pyarrow.parquet.write_table(table, path)
    elif ending.lower() in ("csv", "tsv"):
        comma = "\t" if ending == "tsv" else ","
        lines = [GOOD.keys(), ("Say a colour:", "red", "True"), ("Say a colour:", "no", " false")]
        path.write_text("".join(comma.join(line) + "\n" for line in lines))
    elif ending == "json":
        path.write_text(json.dumps([GOOD, BAD]))
    else:
        path.write_text(json.dumps(GOOD) + "\n" + json.dumps(BAD))
    assert [row["label"] for row in normalise_labelled(read_rows(path)).rows] == [True, False]


def test_conversations_answer_in_one_message(tmp_path: Path):
    rows = [
        {"prompt": ASKED, "completion": said(text), "label": label}
        for text, label in (("red", True), ("no", False))
    ]
    assert read(tmp_path, *rows).rows[1] == {"prompt": ASKED, "completion": "no", "label": False}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "q", "completion": "a"}, "no field 'label'"),
        ({"prompt": "q", "completion": "a", "lable": True}, "Did you mean 'lable'?"),
        ({"completion": "a", "label": True}, "no field 'prompt'"),
        ({**GOOD, "completion": "  "}, "'completion' is blank"),
        ({**GOOD, "prompt": None}, "'prompt' is null"),
        ({**GOOD, "completion": 3}, "'completion' is of type int; expected text"),
        ({**GOOD, "label": 1}, "'label' is 1, of type int; expected true"),
        ({**GOOD, "label": "true"}, "'label' is 'true', of type str; expected true"),
        ({**GOOD, "label": None}, "'label' is null; write true or false"),
        ({**GOOD, "score": 3}, "the field 'score' is not one of a labelled row"),
        ({**GOOD, "completion": said("a")}, "'completion' is of type list, but"),
        ({**BAD, "completion": " red "}, "as in line 1, with the other label"),
    ],
)
def test_a_wrong_row_is_a_sentence_with_file_and_line(
    tmp_path: Path, row: dict[str, Any], sentence: str
):
    with pytest.raises(DataError) as caught:
        read(tmp_path, GOOD, row)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": ASKED, "completion": []}, "'completion' holds no messages"),
        ({"prompt": ASKED, "completion": ASKED}, "it adds 'user'"),
        ({"prompt": ASKED, "completion": [*said("a"), *ASKED]}, "it adds 'assistant', 'user'"),
        ({"prompt": said("a"), "completion": said("b")}, "must end in a message of 'user'"),
        ({"prompt": "q", "completion": said("a")}, "'prompt' must be a list of objects"),
        ({"prompt": ASKED, "completion": [{"role": "gpt", "content": "a"}]}, "role 'gpt'"),
    ],
)
def test_a_wrong_conversation_is_a_sentence(tmp_path: Path, row: dict[str, Any], sentence: str):
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: ") as caught:
        read(tmp_path, {**row, "label": True})
    assert sentence in str(caught.value)


def test_a_table_with_another_word_for_a_label_is_a_sentence(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\nq,a,true\nq,b,yes\n")
    with pytest.raises(DataError, match=r"rows\.csv, line 3: 'label' is 'yes'.*expected true"):
        normalise_labelled(read_rows(path))
    path.write_text("prompt,completion,label\nq,a,true\nq,b,\n")
    with pytest.raises(DataError, match=r"line 3: 'label' is (blank|null)"):
        normalise_labelled(read_rows(path))


def test_rows_that_tell_nothing_apart_are_a_sentence(tmp_path: Path):
    other = {**GOOD, "completion": "blue"}
    with pytest.raises(DataError, match="all 2 rows are labelled true, so that nothing tells"):
        read(tmp_path, GOOD, other)
    with pytest.raises(DataError, match="all 2 rows are labelled false"):
        read(tmp_path, {**GOOD, "label": False}, {**other, "label": False})
    with pytest.raises(DataError, match="all 2 rows have the same completion"):
        read(tmp_path, GOOD, {**GOOD, "prompt": "p", "label": False})


def test_empty_rows_are_left_out_only_when_asked(tmp_path: Path):
    rows = [GOOD, {**GOOD, "completion": ""}, {**BAD, "label": None}, BAD]
    found = read(tmp_path, *rows, skip_empty=True)
    assert (found.lines, found.skipped) == ([1, 4], [2, 3])


def test_rows_of_one_prompt_stay_on_one_side_of_a_split(tmp_path: Path):
    rows = [{"prompt": f"q{i // 5}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(50)]
    parts = split(read(tmp_path, *rows), (0.5, 0.25, 0.25))
    prompts = [{row["prompt"] for row in part.rows} for part in parts]
    assert sum(len(part) for part in parts) == 50
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 10


def test_a_remark_called_label_makes_no_labelled_row(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [
        GOOD,
        {**GOOD, "label": "colour"},
        {**GOOD, "label": "colour", "id": 1},
        {"label": True},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**GOOD, "id": 1}]))
    assert [are_labelled(row) for row in read_rows(path)] == [True, True, False, False, True]


def test_a_group_column_may_stand_beside_the_three(tmp_path: Path):
    found = read(tmp_path, {**GOOD, "patient": 7}, {**BAD, "patient": 8}, group="patient")
    assert found.groups == ["7", "8"]


def test_desirable_rows_are_supervised_ones(tmp_path: Path):
    rows = read(tmp_path, BAD, GOOD)
    assert by_label(rows) == ([1], [0])
    assert desirable_of(rows).rows == [{"prompt": "Say a colour:", "completion": " red"}]
    assert desirable_of(rows).lines == [2]


# Tokens


def test_only_the_answer_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    good, bad = encode_labelled(read(tmp_path, GOOD, BAD), TextReader(tokenizer), 64)
    assert (trained(good, tokenizer), trained(bad, tokenizer)) == (" red<|end|>", " no<|end|>")
    assert (good.desirable, bad.desirable) == (True, False)
    assert str(tokenizer.decode(good.answer.input_ids[: good.start])) == GOOD["prompt"]
    assert good.answer.ends


def test_of_a_conversation_only_the_last_answer_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    turns = [*ASKED, *said("black"), {"role": "user", "content": "Another?"}]
    rows = [
        {"prompt": turns, "completion": said(text), "label": label}
        for text, label in (("red", True), ("no", False))
    ]
    good, bad = encode_labelled(read(tmp_path, *rows), TextReader(tokenizer), 64)
    assert (trained(good, tokenizer), trained(bad, tokenizer)) == ("red<|end|>", "no<|end|>")


def test_a_prompt_that_fills_the_row_is_a_sentence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    rows = read(tmp_path, GOOD, {**BAD, "prompt": "Say a colour and then another colour:"})
    with pytest.raises(DataError, match=r"line 2: the prompt fills all 8 tokens.*max_length \d+"):
        encode_labelled(rows, TextReader(tokenizer), 8)


def test_answers_of_both_labels_that_are_cut_to_the_same_are_a_sentence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    both = [("a b c d e f", True), ("a b c d e g", False)]
    rows = read(tmp_path, *({"prompt": "q", "completion": c, "label": x} for c, x in both))
    whole = len(encode_labelled(rows, TextReader(tokenizer), 64)[0].answer.input_ids)
    with pytest.raises(DataError, match=rf"line 2: cut at .* of line 1.* max_length {whole} keeps"):
        encode_labelled(rows, TextReader(tokenizer), whole - 2)
    good, _ = encode_labelled(rows, TextReader(tokenizer), whole - 1)
    assert good.answer.truncated
    assert not good.answer.ends


# Prompts with other rows' answers


def test_a_prompt_beside_another_answer_keeps_both_as_they_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    rows = read(tmp_path, GOOD, {**BAD, "prompt": "Another, longer prompt:"})
    good, bad = encode_labelled(rows, TextReader(tokenizer), 64)
    found = Labelled(beside(bad, good, 64), True)
    assert trained(found, tokenizer) == " red<|end|>"
    assert found.start == bad.start
    cut = beside(bad, good, bad.start + 1)
    assert len(cut.input_ids) == bad.start + 1
    assert cut.trained == [False] * bad.start + [True]


def test_mismatched_answers_come_from_the_same_batch_or_from_half_way(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    words = ["red", "green", "blue", "black", "white", "pink", "grey", "gold", "tan"]
    raw = [{"prompt": f"{i}:", "completion": w, "label": i % 2 == 0} for i, w in enumerate(words)]
    rows = encode_labelled(read(tmp_path, *raw), TextReader(tokenizer), 64)

    def whose(found: Any) -> list[int]:
        texts = [trained(Labelled(row, True), tokenizer) for row in found]
        return [words.index(text.strip().removesuffix("<|end|>")) for text in texts]

    order = kept_order([0] * 9, 4, 5, 0)
    expected = {}
    for batch in (order[:4], order[4:8]):
        expected |= {row: batch[i - 1] for i, row in enumerate(batch)}
    expected[order[8]] = order[7]
    found = whose(mismatched_in_batches(rows, 4, 5, 64))
    assert dict(enumerate(found)) == expected
    assert whose(mismatched(rows, 64)) == [(i - 4) % 9 for i in range(9)]
    assert mismatched(rows[:1], 64) == []
