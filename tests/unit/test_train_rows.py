from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from train_tiny import make_data
from transformers import AutoTokenizer

from inlay.errors import DataError
from inlay.model.folder import EMBEDDED
from inlay.train.config import RunConfig, load_config
from inlay.train.rows import encode_rows, rows_of_run, sample, training_template


def run(data: Path, **changes: object) -> RunConfig:
    return load_config(None, {"model": "m", "output": "o", "data": str(data), **changes})


def test_a_split_depends_on_the_rows_and_not_on_the_seed(tmp_path: Path):
    data = make_data(tmp_path / "d.jsonl", rows=40)
    one, other = (rows_of_run(run(data, seed=seed)) for seed in (0, 1))
    assert one == other
    assert len(one.train) + len(one.validation) + len(one.test) == 40
    assert one.validation.lines != one.test.lines


def test_a_part_that_is_empty_is_stood_in_for(tmp_path: Path):
    data = make_data(tmp_path / "d.jsonl", rows=40)
    no_test = rows_of_run(run(data, split=[0.8, 0.2, 0.0]))
    assert no_test.test == no_test.validation
    nothing = rows_of_run(run(data, split=[1.0, 0.0, 0.0]))
    assert (len(nothing.train), len(nothing.validation), len(nothing.test)) == (40, 0, 0)


def test_held_out_data_of_its_own(tmp_path: Path):
    data, held_out = make_data(tmp_path / "d.jsonl", 9), make_data(tmp_path / "e.jsonl", 5)
    found = rows_of_run(run(data, eval_data=str(held_out)))
    assert (len(found.train), len(found.validation), len(found.test)) == (9, 5, 5)
    assert len(found.sha256) == 64 + 1 + 64


def test_max_rows_and_columns(tmp_path: Path):
    data = make_data(tmp_path / "d.jsonl", 30)
    found = rows_of_run(run(data, max_rows=20, prompt="Say: {prompt}", completion="completion"))
    assert len(found.train) + len(found.validation) + len(found.test) == 20
    assert found.train.rows[0]["prompt"].startswith("Say: ")
    with pytest.raises(DataError, match="no field 'nothing'"):
        rows_of_run(run(data, text="nothing"))


def test_preferences_may_have_the_column_to_split_by_in_held_out_data_too(tmp_path: Path):
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    pairs.write_text("\n".join(json.dumps({**row, "patient": i // 2}) for i in range(8)))
    named = {"task": "dpo", "split_by": "patient"}
    assert len(rows_of_run(run(pairs, **named, eval_data=str(pairs))).test) == 8
    found = rows_of_run(run(pairs, **named, split=[0.5, 0.25, 0.25]))
    assert [len(part) for part in (found.train, found.validation, found.test)] == [4, 2, 2]
    with pytest.raises(DataError, match="the field 'patient' is not one of a preference"):
        rows_of_run(run(pairs, task="dpo"))


def test_a_sample_is_spread_evenly(tmp_path: Path):
    rows = rows_of_run(run(make_data(tmp_path / "d.jsonl", 30), split=[1.0, 0.0, 0.0])).train
    assert sample(rows, 100) is rows
    assert sample(rows, 3).lines == [1, 11, 21]


def test_a_template_trl_does_not_know_leaves_the_tokenizers_own() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["pocket"])
    assert training_template(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert training_template(tokenizer) is None


def test_a_template_that_trl_knows_is_replaced_by_one_that_marks_the_answer(
    tmp_path: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["pocket"])
    folder = Path(find_spec("trl").origin).parent / "chat_templates"
    tokenizer.chat_template = (folder / "qwen3.jinja").read_text()
    data = tmp_path / "chat.jsonl"
    turns = [("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "No.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data.write_text(json.dumps(row))
    rows = rows_of_run(run(data, split=[1.0, 0.0, 0.0])).train
    (found,) = encode_rows(rows, tokenizer, 128)
    trained = [i for i, t in zip(found.input_ids, found.trained, strict=True) if t]
    text = tokenizer.decode(trained)
    assert "Yes." in text
    assert "No." in text
    assert "One?" not in text
    assert "Two?" not in text
