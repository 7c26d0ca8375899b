"""Every verb on preferences: data, train, eval, generate, merge, plan; and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.cli.main import main
from inlay.data.reports import generate_reports

TRAIN = [
    "train", "--model", "pocket", "--max-steps", "2", "--rank", "2",
    "--learning-rate", "1e-2", "--batch-size", "2", "--generate-rows", "2",
    "--generate-tokens", "4", "--threads", "1",
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    pairs = write(folder / "pairs.jsonl", rows_of(30))
    line = [*TRAIN, "--task", request.param, "--data", str(pairs)]
    assert main([*line, "--output", str(folder / "run")]) == 0
    return folder


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
@pytest.mark.parametrize("verb", ["train", "data"])
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
    line = [verb, "--task", task, "--model", "pocket", "--data", str(pairs), "--max-length", "64"]
    line += ["--output", str(tmp_path / "out"), "--split", "1", "0", "0"]
    assert main(line) == 2
    err = capsys.readouterr().err
    (only,) = [text for text in err.splitlines() if "--help" not in text and "reading" not in text]
    assert sentence in only
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "dop"], "there is no task 'dop'"),
        (["--task", "dpo", "--packing", "bfd"], "'packing' does not apply to the task 'dpo'"),
        (["--task", "dpo", "--eight-bits"], "'eight_bits' does not apply to the task 'dpo'"),
        (["--task", "dpo", "--cache-trunk", "true"], "'cache_trunk' does not apply"),
        (["--beta", "0.1"], "'beta' belongs to the task dpo and grpo and kto and orpo"),
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
    line = ["eval", "--adapter", str(run / "run"), "--generate-rows", "0", "--json"]
    assert main([*line, "--data", str(run / "pairs.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    own = json.loads((run / "run" / "run.json").read_text())["comparison"]
    assert found["rows_held_out_by_the_run"] is True
    values = [
        {m["name"]: m["tuned"]["value"] for m in record["metrics"]} for record in (found, own)
    ]
    for name in ("accuracy", "margin", "loss", "chosen_loss"):
        assert values[0][name] == pytest.approx(values[1][name], rel=1e-4)
    assert main([*line, "--data", "reports", "--max-rows", "4"]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.slow
def test_generate_and_merge_take_the_preferred_answers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["generate", "--adapter", str(run / "run"), "--generate-tokens", "3", "--json"]
    assert main([*start, "--data", str(run / "pairs.jsonl"), "--max-rows", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["expected"] for row in found] == [row["chosen"] for row in rows_of(30)[:2]]
    merged = ["merge", "--adapter", str(run / "run"), "--output", str(run / "merged"), "--json"]
    assert main(merged) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["inputs"], report["positions"] > 0) == ("given", True)


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
