"""Every verb on labelled rows: data, train, eval, generate, merge, plan; and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from demo_data.reports import generate_reports
from verbs import (
    check_merges,
    check_sentence,
    evaluated,
    every_reading_verb,
    generated,
    run_on,
    write,
)

from inlay.cli.main import main

TRAIN = [
    "train", "--task", "kto", "--model", "pocket", "--max-steps", "2", "--rank", "2",
    "--learning-rate", "1e-2", "--batch-size", "2", "--generate-rows", "2",
    "--generate-tokens", "4", "--split", "0.6", "0.2", "0.2", "--threads", "1",
]  # fmt: skip
COLOURS = [
    {"prompt": "Say a colour:", "completion": "red", "label": True},
    {"prompt": "Say a colour:", "completion": "no", "label": False},
]


def rows_of(count: int) -> list[dict[str, Any]]:
    """Return labelled rows, two of three desirable; each report is the prompt of one."""
    return [
        {
            "prompt": f"Findings: {report.findings}\nImpression:",
            "completion": report.impression if i % 3 else "No.",
            "label": bool(i % 3),
        }
        for i, report in enumerate(generate_reports(count, seed=1))
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run and the rows it was trained on."""
    return run_on(tmp_path_factory.mktemp("labelled"), TRAIN, rows_of(45))


def test_data_counts_the_labels_and_shows_what_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", [*COLOURS, {**COLOURS[0], "completion": "blue"}])
    line = ["data", str(rows), "--task", "kto", "--split", "1", "0", "0", "--show", "2"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "rows of labelled" in out
    assert "line 1" in out
    assert "desirable:\nSay a colour:[ red<|end|>]" in out
    assert "undesirable:\nSay a colour:[ no<|end|>]" in out
    assert out.count("\nSay a colour:") == 2
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "labelled"
    counts = {name: part["rows"] for name, part in found["parts"].items()}
    assert counts == {"train desirable": 2, "train undesirable": 1}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "q", "completion": "a"}, "line 3: no field 'label'"),
        ({"prompt": "q", "completion": "", "label": True}, "line 3: 'completion' is blank"),
        ({"prompt": "q", "completion": "a", "label": "yes"}, "line 3: 'label' is 'yes'"),
        ({"prompt": "q", "completion": "a", "label": 0}, "line 3: 'label' is 0, of type int"),
        ({**COLOURS[0], "label": False}, "line 3: the same prompt and completion as in line 1"),
        ({**COLOURS[0], "completion": "x", "y": 1}, "line 3: the field 'y' is not one of"),
        ({"prompt": "q " * 99, "completion": "a", "label": True}, "line 3: the prompt fills all"),
    ],
)
@every_reading_verb
def test_bad_rows_are_a_sentence_and_exit_code_2(
    verb: str,
    row: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write(tmp_path / "p.jsonl", [*COLOURS, row])
    check_sentence([verb, "--task", "kto", "--data", str(rows)], sentence, tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--packing", "bfd"], "'packing' does not apply to the task 'kto'"),
        (["--eight-bits"], "'eight_bits' does not apply to the task 'kto'"),
        (["--cache-trunk", "true"], "'cache_trunk' does not apply"),
        (["--beta", "-1"], "'beta' must be a number of at least 0"),
        (["--beta", "0"], "'beta' must be a number above 0"),
        (["--undesirable-weight", "0"], "'undesirable_weight' must be 'auto' or a number above 0"),
        (["--batch-size", "1"], "'batch_size' must be at least 2 for the task 'kto'"),
        (["--task", "dpo", "--desirable-weight", "2"], "'desirable_weight' belongs to the task"),
    ],
)
def test_a_key_that_does_not_apply_is_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--model", "pocket", "--data", "d", "--output", "o"]
    assert main([*line, *([] if "--task" in words else ["--task", "kto"]), *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_says_how_the_labels_weigh(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(run / "rows.jsonl")
    words = ["--desirable-weight", "9", "--undesirable-weight", "1", "--no-evaluate"]
    assert main([*TRAIN, "--data", rows, "--output", str(run / "heavy"), *words]) == 0
    err = capsys.readouterr().err
    assert "weigh 9 each" in err
    assert "to 1 in all, outside the 1 to 4/3 that the paper advises" in " ".join(err.split())
    assert json.loads((run / "heavy" / "run.json").read_text())["weights"]["desirable"] == 9


@pytest.mark.slow
def test_eval_measures_the_rows_the_run_held_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now, then = evaluated(run, ["--generate-rows", "0"], capsys)
    for name in ("auc", "reward_margin", "loss", "desirable_reward", "desirable_loss"):
        assert now[name] == pytest.approx(then[name], rel=2e-3)
    line = ["eval", "--adapter", str(run / "run"), "--generate-rows", "0"]
    assert main([*line, "--data", str(run / "rows.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "loss per row" in out
    assert "desirable answer more likely (AUC)" in out
    assert main([*line, "--data", "reports", "--max-rows", "4", "--json"]) == 0
    assert "perplexity" in capsys.readouterr().out
    alike = write(run / "alike.jsonl", [row for row in rows_of(9) if row["label"]])
    assert main([*line, "--data", str(alike)]) == 2
    assert "all 6 rows are labelled true" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_and_merge_take_the_desirable_answers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [row["completion"] for row in rows_of(45) if row["label"]]
    assert [row["expected"] for row in generated(run, 4, capsys)] == good[:4]
    parted = write(run / "parted.jsonl", sorted(rows_of(9), key=lambda row: row["label"]))
    line = ["generate", "--adapter", str(run / "run"), "--generate-tokens", "3", "--json"]
    assert main([*line, "--data", str(parted), "--max-rows", "1"]) == 0
    assert [row["expected"] for row in json.loads(capsys.readouterr().out)] == good[:1]
    check_merges(run, capsys)


@pytest.mark.slow
def test_a_plan_counts_both_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", rows_of(30))
    line = ["plan", "--method", "lora", "--model", "pocket", "--batch-size", "4", "--json"]
    flops = {}
    for task in ("sft", "kto"):
        words = [*line, "--data", str(rows), "--task", task]
        assert main([*words, *(["--packing", "false"] if task == "sft" else [])]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["largest_batch"]["rows"] == 4
        flops[task] = found["options"][0]["flops"]
    assert flops["kto"] > 1.2 * flops["sft"]
