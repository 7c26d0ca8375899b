"""Every verb on prompts and rewards: data, train, eval, generate, merge, plan; what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from demo_data.arithmetic import generate_problems
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

REWARDS = ["--rewards", "{name: regex, pattern: '[aeiou]{2}'}", "{name: length, most: 4}"]
TRAIN = [
    "train", "--task", "grpo", "--model", "pocket", "--max-steps", "2", "--rank", "2",
    "--learning-rate", "1e-2", "--batch-size", "8", "--gradient-accumulation", "1",
    "--num-generations", "4", "--max-completion-tokens", "8", "--threads", "1", *REWARDS,
]  # fmt: skip


def rows_of(count: int) -> list[dict[str, Any]]:
    problems = generate_problems(count, seed=1)
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run and the prompts it was trained on."""
    return run_on(tmp_path_factory.mktemp("rewards"), TRAIN, rows_of(30))


def test_data_shows_prompts_columns_and_what_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(2)]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    line = ["data", str(prompts), "--task", "grpo", "--split", "1", "0", "0", "--show", "1"]
    line += ["--rewards", "final_number"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "rows of prompt" in out
    assert "What is 0 + 1?\n" in out
    assert "the reward final_number: weight 1, reads 'answer'" in out
    assert "answer" in out.rsplit("What is 0 + 1?", 1)[1]
    assert "do not teach the model to stop" not in out
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "prompt"
    assert found["parts"]["train"]["trained_tokens"] == 0


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"answer": "1"}, "line 2: no field 'prompt'"),
        ({"prompt": "", "answer": "1"}, "line 2: 'prompt' is blank"),
        ({"prompt": "q"}, "line 2: no field 'answer'; the row has 'prompt'. The reward final_num"),
        ({"prompt": "q", "answer": ""}, "line 2: 'answer' is empty, and the reward final_number"),
        ({"prompt": "q " * 99, "answer": "1"}, "line 2: the prompt has "),
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
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "p", "answer": "1"}, row])
    words = [verb, "--task", "grpo", "--rewards", "final_number", "--data", str(prompts)]
    check_sentence(words, sentence, tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "grpo"], "the task 'grpo' needs 'rewards'"),
        (["--task", "grpo", "--rewards", "regx"], "there is no reward 'regx'"),
        (["--task", "grpo", "--rewards", "regex"], "'regex' needs the argument 'pattern'"),
        (["--task", "grpo", "--rewards", "nowhere.py:f"], "there is no file nowhere.py"),
        (["--task", "grpo", "--rewards", "json", "--packing", "bfd"], "'packing' does not apply"),
        (["--task", "grpo", "--rewards", "json", "--eight-bits"], "'eight_bits' does not apply"),
        (["--task", "grpo", "--rewards", "json", "--num-generations", "3"], "is no multiple of"),
        (["--task", "grpo", "--rewards", "json", "--generation", "x"], "'generation' must be one"),
        (["--task", "grpo", "--rewards", "json", "--top-p", "0"], "'top_p' must be a number above"),
        (["--rewards", "json"], "'rewards' belongs to the task grpo"),
        (["--temperature", "1"], "'temperature' belongs to the task grpo"),
    ],
)
def test_a_key_that_does_not_apply_is_refused(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path / "p.jsonl", rows_of(20))
    line = ["train", "--model", "pocket", "--data", str(prompts), "--output", str(tmp_path / "o")]
    assert main([*line, *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_file_that_fails_is_a_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path / "p.jsonl", rows_of(20))
    (tmp_path / "mine.py").write_text("def worth(completions, **rest):\n    return [None]\n")
    line = [*TRAIN[: TRAIN.index("--rewards")], "--data", str(prompts)]
    line += ["--output", str(tmp_path / "o"), "--rewards", f"{tmp_path / 'mine.py'}:worth"]
    assert main([*line, "--split", "1", "0", "0"]) == 2
    assert "mine.py:worth' returned 1 values for 8 answers at step 1" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_judges_the_prompts_the_run_held_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now, then = evaluated(run, [], capsys)
    assert set(now) == set(then) > {"reward", "sampled_reward", "kl"}
    assert now == pytest.approx(then, rel=1e-4)
    more = write(run / "more.jsonl", rows_of(40)[30:])
    line = ["eval", "--adapter", str(run / "run"), "--data", str(more), "--generate-tokens", "3"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "reward of greedy answers" in out
    assert "KL to the base, nats per token" in out


@pytest.mark.slow
def test_generate_and_merge_take_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [row["prompt"] for row in generated(run, 2, capsys)]
    assert prompts == [row["prompt"] for row in rows_of(30)[:2]]
    check_merges(run, capsys)


@pytest.mark.slow
def test_a_plan_counts_prompt_and_answer_and_the_cache(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["plan", "--method", "lora", "--model", "pocket", "--batch-size", "4", "--json"]
    line += ["--task", "grpo", "--rewards", "json", "--num-generations", "4"]
    line += ["--data", str(run / "rows.jsonl")]
    plans = []
    for tokens, accumulation in (("32", "1"), ("64", "1"), ("64", "64")):
        words = ["--max-completion-tokens", tokens, "--gradient-accumulation", accumulation]
        assert main([*line, *words]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    lengths = [plan["largest_batch"]["length"] for plan in plans]
    assert [plan["largest_batch"]["rows"] for plan in plans] == [4, 4, 4]
    assert lengths[1] == lengths[2] == lengths[0] + 32
    assert "key-value cache" in plans[2]["options"][0]["bytes"]
    assert plans[2]["options"][0]["total"] > plans[1]["options"][0]["total"]
