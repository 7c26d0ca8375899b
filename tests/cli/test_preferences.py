"""Every verb on preferences: data, train, eval, generate, merge, plan; and what they refuse."""

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
    "train", "--model", "pocket", "--max-steps", "2", "--rank", "2",
    "--learning-rate", "1e-2", "--batch-size", "2", "--generate-rows", "2",
    "--generate-tokens", "4", "--threads", "1",
]  # fmt: skip


def rows_of(count: int) -> list[dict[str, Any]]:
    reports = generate_reports(count, seed=1)
    return [
        {
            "prompt": f"Findings: {r.findings}\nImpression:",
            "chosen": r.impression,
            "rejected": "No.",
        }
        for r in reports
    ]


@pytest.fixture(scope="module", params=["dpo", "orpo"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run and the pairs it was trained on."""
    folder = tmp_path_factory.mktemp(request.param)
    return run_on(folder, [*TRAIN, "--task", request.param], rows_of(30))


def test_data_shows_both_answers_and_what_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "Say a colour:", "chosen": "red", "rejected": "blue"}
    pairs = write(tmp_path / "pairs.jsonl", [row, {**row, "prompt": "One more colour:"}])
    line = ["data", str(pairs), "--task", "dpo", "--split", "1", "0", "0", "--show", "1"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "chosen:\nSay a colour:[ red<|end|>]\nrejected:\nSay a colour:[ blue<|end|>]" in out
    assert "rows of preference" in out
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "preference"
    assert set(found["parts"]) == {"train chosen", "train rejected"}
    assert main(["data", str(pairs), "--data", str(pairs), "--task", "dpo"]) == 2
    assert "named twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "q", "chosen": "a"}, "line 2: no field 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "line 2: 'rejected' is blank"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "line 2: 'chosen' and 'rejected' are"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "x": 1}, "line 2: the field 'x' is not"),
        ({"prompt": "q " * 99, "chosen": "a", "rejected": "b"}, "line 2: the prompt fills all 64"),
    ],
)
@every_reading_verb
@pytest.mark.parametrize("task", ["dpo", "orpo"])
def test_bad_rows_are_a_sentence_and_exit_code_2(
    task: str,
    verb: str,
    row: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}, row])
    check_sentence([verb, "--task", task, "--data", str(pairs)], sentence, tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "dop"], "there is no task 'dop'"),
        (["--task", "dpo", "--packing", "bfd"], "'packing' does not apply to the task 'dpo'"),
        (["--task", "dpo", "--eight-bits"], "'eight_bits' does not apply to the task 'dpo'"),
        (["--task", "dpo", "--cache-trunk", "true"], "'cache_trunk' does not apply"),
        (["--beta", "0.1"], "'beta' belongs to the tasks dpo, grpo, kto and orpo"),
        (["--task", "orpo", "--packing", "true"], "'packing' does not apply to the task 'orpo'"),
        (["--task", "orpo", "--eight-bits"], "'eight_bits' does not apply to the task 'orpo'"),
        (["--task", "dpo", "--beta", "-1"], "'beta' must be a number of at least 0"),
        (["--task", "dpo", "--beta", "0"], "'beta' must be a number above 0"),
    ],
)
def test_a_key_that_does_not_apply_is_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--model", "pocket", "--data", "d", "--output", "o", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_eval_measures_the_pairs_the_run_held_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now, then = evaluated(run, ["--generate-rows", "0"], capsys)
    for name in ("accuracy", "margin", "loss", "chosen_loss"):
        assert now[name] == pytest.approx(then[name], rel=1e-4)
    line = ["eval", "--adapter", str(run / "run"), "--generate-rows", "0", "--json"]
    assert main([*line, "--data", "reports", "--max-rows", "4"]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.slow
def test_eval_on_the_runs_own_data_needs_rows_that_it_held_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, whole = str(run / "rows.jsonl"), str(run / "whole")
    words = ["--task", "dpo", "--data", data, "--output", whole, "--split", "1", "0", "0"]
    assert main([*TRAIN, *words]) == 0
    capsys.readouterr()
    assert main(["eval", "--adapter", whole, "--data", data]) == 2
    assert "trained on all rows of" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_and_merge_take_the_preferred_answers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [row["expected"] for row in generated(run, 2, capsys)]
    assert expected == [row["chosen"] for row in rows_of(30)[:2]]
    check_merges(run, capsys)


@pytest.mark.slow
def test_a_plan_counts_both_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write(tmp_path / "pairs.jsonl", rows_of(30))
    line = ["plan", "--method", "lora", "--model", "pocket", "--batch-size", "3", "--json"]
    flops = {}
    for task in ("dpo", "orpo"):
        assert main([*line, "--data", str(pairs), "--task", task]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["largest_batch"]["rows"] == 6
        flops[task] = found["options"][0]["flops"]
    assert flops["orpo"] > flops["dpo"]  # the head scores the preferred rows' prompts, too
