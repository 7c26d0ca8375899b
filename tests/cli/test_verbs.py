"""Every verb at work, on the smallest sizes: train, eval, generate, merge, demo, methods."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inlay.cli import demo
from inlay.cli.main import main

SMALL = {
    "max_steps": 2, "batch_size": 2, "max_length": 256, "eval_rows": 4, "generate_rows": 2,
    "generate_tokens": 4, "rank": 2, "max_rows": 200,
}  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small demo, and what the demo printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "RUN", demo.RUN | SMALL)
        patch.setattr(demo, "MERGE_ROWS", 2)
        patch.chdir(tmp_path_factory.mktemp("demo"))
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            assert main(["demo", "--output", "run"]) == 0
        return Path.cwd() / "run", written.getvalue()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = ["The heart is normal.", "The lungs are clear.", "There is a fracture."]
    lines = [{"prompt": f"Findings: {t}\nImpression:", "completion": "None."} for t in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_demo_ends_with_everything_promised(shown: tuple[Path, str]) -> None:
    folder, out = shown
    for promised in (
        "inlay train --model pocket --data reports",
        "parameters (",
        "peak memory",
        "adapter",
        "model ",
        "base against tuned",
        "loss, nats per token",
        "ROUGE-L",
        "95% bootstrap intervals",
        "merge: the merged model against",
        "largest logit difference",
        "base writes",
        "tuned writes",
        "report.html",
        "--model Qwen/Qwen3-0.6B --data my.jsonl",
    ):
        assert promised in out, promised
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "KL" in page
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_a_second_run_does_not_overwrite_the_first(
    shown: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = shown
    line = ["train", "--model", "pocket", "--data", "reports", "--output", str(folder)]
    assert main(line) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_eval_needs_only_the_folder_and_rows(
    shown: tuple[Path, str], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", "--adapter", str(shown[0]), "--data", str(rows), "--generate-rows", "2"]
    assert main([*line, "--generate-tokens", "4", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["base"] == "pocket"
    assert found["rows"] == 3
    assert found["rows_held_out_by_the_run"] is False
    names = {metric["name"] for metric in found["metrics"]}
    assert {"loss", "perplexity", "exact_match", "token_f1", "rouge_l"} <= names
    assert all("p_value" in metric for metric in found["metrics"])


@pytest.mark.parametrize(("flags", "rows"), [([], 20), (["--max-rows", "5"], 5)])
def test_eval_on_the_runs_own_data_measures_only_what_it_held_out(
    flags: list[str], rows: int, shown: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", "--adapter", str(shown[0]), "--data", "reports", "--generate-rows", "0"]
    assert main([*line, *flags, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["rows_held_out_by_the_run"] is True
    assert found["rows"] == rows


def test_eval_on_the_runs_own_data_takes_no_columns_that_divide_it_otherwise(
    shown: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", "--adapter", str(shown[0]), "--data", "reports", "--generate-rows", "0"]
    assert main([*line, "--prompt", "Say: {findings}", "--completion", "impression"]) == 2
    assert "leave --prompt and --completion out" in capsys.readouterr().err


def test_eval_tells_of_rows_that_are_left_out_and_where_its_example_stands(
    shown: tuple[Path, str], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = rows.with_name("some.jsonl")
    empty = json.dumps({"prompt": "Findings: none.", "completion": ""})
    some.write_text(empty + "\n" + rows.read_text())
    line = ["eval", "--adapter", str(shown[0]), "--data", str(some), "--generate-rows", "1"]
    assert main([*line, "--generate-tokens", "2", "--skip-empty"]) == 0
    out = capsys.readouterr().out
    assert "left out for an empty field: 1 (line 1)" in out
    assert f"{some}, line 2, before and after" in out


def test_data_shows_each_row_of_a_list_that_stands_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": f"number {i}", "completion": "a"} for i in range(3)]))
    assert main(["data", str(path), "--split", "1", "0", "0"]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"number {i}[ a") for i in range(3)] == [1, 1, 1]


def test_generate_continues_a_prompt_and_rows(
    shown: tuple[Path, str], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["generate", "--adapter", str(shown[0]), "--generate-tokens", "3", "--json"]
    assert main([*start, "--prompt", "The heart"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "The heart"
    assert main([*start, "--data", str(rows), "--max-rows", "2", "--base"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [row["expected"] for row in both] == ["None.", "None."]
    assert all({"text", "base"} <= set(row) for row in both)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give --adapter or --model, one of them"),
        (["--adapter", "x", "--model", "pocket", "--prompt", "a"], "not both"),
        (["--model", "pocket"], "give --prompt or --data, one of them"),
        (["--model", "pocket", "--prompt", "a", "--base"], "give --adapter"),
        (["--adapter", "no/such", "--prompt", "a"], "no/such does not exist"),
        (["--model", "no/such/model", "--prompt", "a"], "there is no folder 'no/such/model'"),
    ],
)
def test_generate_refuses_what_makes_no_sense(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_merge_saves_a_plain_model_that_is_the_tuned_one(
    shown: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    line = ["merge", "--adapter", str(shown[0]), "--output", str(output), "--rows", "2"]
    assert main([*line, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["inputs"] == "given"
    assert record["top1_agreement"] > 0.9
    assert record["checked"].startswith("on the written files, read back by AutoModelFor")
    assert record["reloaded_logit_difference"] < 1
    assert json.loads((output / "merge.json").read_text())["base"] == "pocket"
    plain = AutoModelForCausalLM.from_pretrained(output)
    tokens = AutoTokenizer.from_pretrained(output)("The heart", return_tensors="pt")
    assert torch.isfinite(plain(**tokens).logits).all()
    assert main(line) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_a_run_that_held_no_row_out_is_merged_on_random_tokens(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "merged"
    line = ["train", "--model", "pocket", "--data", str(rows), "--output", str(run)]
    line += ["--split", "1", "0", "0", "--max-steps", "1", "--batch-size", "1", "--rank", "2"]
    assert main(line) == 0
    capsys.readouterr()
    merging = ["merge", "--adapter", str(run), "--output", str(output), "--json"]
    moved = rows.rename(rows.with_name("moved.jsonl"))
    assert main(merging) == 2
    assert "name others with --data" in capsys.readouterr().err
    moved.rename(rows)
    assert main(merging) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == "random"


def test_a_target_that_matches_nothing_leaves_no_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--model", "pocket", "--data", "reports", "--max-rows", "50"]
    line += ["--output", str(tmp_path / "out"), "--targets", "q_proj", "q_prj"]
    assert main(line) == 2
    assert "'q_prj' matches no layer" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_methods_is_readable_by_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "lora" in [method["name"] for method in found]
    assert all(method["class"].startswith("inlay.") for method in found)
