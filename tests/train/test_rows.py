from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from train_tiny import make_data
from transformers import AutoTokenizer

from inlay.data.text_reader import TextReader
from inlay.data.tokens import encode
from inlay.errors import DataError
from inlay.model.load.folder import EMBEDDED
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.train.rows import rows_of_run, sample
from inlay.train.trl import training_template


def run(data: Path, **changes: object) -> RunConfig:
    return load_config(None, {"model": "m", "output": "o", "data": str(data), **changes})


def test_a_split_depends_on_the_rows_and_not_on_the_seed(tmp_path: Path):
    data = make_data(tmp_path / "d.jsonl", rows=40)
    one, other = (rows_of_run(run(data, seed=seed)) for seed in (0, 1))
    assert one == other
    assert "not of the split" in str(RunConfig.model_fields["seed"].description)
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


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_is_to_be_known_of_held_out_data_is_told(tmp_path: Path):
    rows: list[dict[str, object]] = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(9)]
    data = write(tmp_path / "d.jsonl", rows)
    other = [{"prompt": "q", "completion": "c"}, {"prompt": "q", "completion": ""}, *rows[3:5]]
    held_out = write(tmp_path / "e.jsonl", other)
    found = rows_of_run(run(Path(data), eval_data=held_out, skip_empty=True))
    assert found.train.notes == [
        f"1 rows of {held_out} left out: a field is empty (lines 2)",
        f"2 rows of {held_out} are training rows, too, so that nothing new is measured on (lines "
        "3, 4)",
    ]
    assert rows_of_run(run(Path(data))).train.notes == []


def test_held_out_labels_are_of_the_kind_of_the_training_rows(tmp_path: Path):
    numbers = [1.5, 2.0, 3.0]
    train = write(tmp_path / "d.jsonl", [{"text": f"t{x}", "label": x} for x in numbers])
    held_out = write(tmp_path / "e.jsonl", [{"text": f"s{x}", "label": x} for x in (1, 2)])
    found = rows_of_run(run(Path(train), task="classify", eval_data=held_out))
    assert (found.train.kind, found.test.kind) == ("number", "number")
    with pytest.raises(DataError, match=r"line 1: 'label' is 1\.5, which names no class"):
        rows_of_run(run(Path(held_out), task="classify", eval_data=train))


def test_held_out_pairs_have_scores_where_the_training_pairs_do(tmp_path: Path):
    pairs = [{"anchor": f"a{i}", "positive": f"p{i}"} for i in range(3)]
    plain = write(tmp_path / "d.jsonl", [dict(pair) for pair in pairs])
    scored = write(tmp_path / "e.jsonl", [{**p, "score": i} for i, p in enumerate(pairs)])
    for data, held_out in ((plain, scored), (scored, plain)):
        with pytest.raises(DataError, match=r"e\.jsonl have scores and those of .*d\.jsonl have"):
            rows_of_run(run(Path(data), task="embed", eval_data=held_out))


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
    (found,) = encode(rows, TextReader(tokenizer, training_template), 128)
    trained = [i for i, t in zip(found.input_ids, found.trained, strict=True) if t]
    text = tokenizer.decode(trained)
    assert "Yes." in text
    assert "No." in text
    assert "One?" not in text
    assert "Two?" not in text
