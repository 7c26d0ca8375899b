"""Every verb on judged answers about images, and what each refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from verbs import as_json, write
from vision_tiny import QUESTION, make_answers, make_digits, make_vision_model

from inlay.cli.main import main

TRAIN = [
    "train", "--max-steps", "3", "--rank", "4", "--learning-rate", "1e-2", "--batch-size", "4",
    "--gradient-accumulation", "1", "--generate-rows", "2", "--generate-tokens", "3",
    "--threads", "1",
]  # fmt: skip
DATA = {"dpo": "digit_pairs.jsonl", "orpo": "digit_pairs.jsonl", "kto": "labelled_digits.jsonl"}
MEASURED = {
    "dpo": ("accuracy", "margin", "loss", "chosen_loss"),
    "orpo": ("accuracy", "margin", "loss", "chosen_loss"),
    "kto": ("auc", "loss", "desirable_loss"),
}
every_task = pytest.mark.parametrize("task", DATA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, scans of digits, judged answers about them, and a run of each task."""
    place = tmp_path_factory.mktemp("judged")
    make_vision_model(place / "llava", "llava")
    make_answers(place, make_digits(place, 60))
    for task, name in DATA.items():
        where = ["--model", str(place / "llava"), "--data", str(place / name), "--task", task]
        split = ["--split", "0.6", "0.2", "0.2"]
        assert main([*TRAIN, *where, *split, "--output", str(place / task)]) == 0
    return place


def test_data_shows_both_answers_to_an_image(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = str(folder / "digit_pairs.jsonl")
    line = ["data", pairs, "--task", "dpo", "--model", str(folder / "llava")]
    assert main([*line, "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "rows of preferences about images" in out
    asked = f"<|user|><image> x 16 {QUESTION}<|end|><|assistant|>"
    assert f"chosen:\n{asked}[0<|end|>]\nrejected:\n{asked}[1<|end|>]" in out
    assert set(as_json(capsys, *line)["parts"]) >= {"train chosen", "train rejected"}


@every_task
def test_eval_measures_the_rows_that_the_run_held_out(
    task: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--adapter", str(folder / task), "--generate-rows", "0"]
    found = as_json(capsys, *words, "--data", str(folder / DATA[task]))
    own = json.loads((folder / task / "run.json").read_text())["comparison"]
    assert found["rows_held_out_by_the_run"] is True
    now, then = (
        {m["name"]: m["tuned"]["value"] for m in record["metrics"]} for record in (found, own)
    )
    for name in MEASURED[task]:
        assert now[name] == pytest.approx(then[name], rel=1e-4)


@every_task
def test_generate_and_merge_take_the_better_answers(
    task: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--adapter", str(folder / task), "--generate-tokens", "2"]
    rows = as_json(capsys, *words, "--data", str(folder / DATA[task]), "--max-rows", "4")
    assert [row["expected"] for row in rows][:2] == ["0", "1"]
    merged = str(folder / f"{task}-merged")
    report = as_json(capsys, "merge", "--adapter", str(folder / task), "--output", merged)
    assert report["inputs"] == "given"
    assert report["checked"].startswith("on the written files")
    assert report["reloaded_logit_difference"] < 0.1


@every_task
def test_a_plan_is_of_a_step_with_images(
    task: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--method", "lora", "--model", str(folder / "llava"), "--rank", "4"]
    words += ["--batch-size", "4", "--data", str(folder / DATA[task]), "--task", task]
    found = as_json(capsys, *words)
    assert found["largest_batch"]["rows"] == (4 if task == "kto" else 8)
    assert found["largest_batch"]["assumed"] is False
    own = json.loads((folder / task / "run.json").read_text())
    assert found["trained_parameters"] == own["trainable"]["count"]
    assert own["memory"]["planned_bytes"] > 0


GOOD = {"image": "scans/0000.png", "prompt": QUESTION, "chosen": "0", "rejected": "1"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"image": "gone.png"}, "line 2: 'image': "),
        ({"image": "broken.png"}, "broken.png cannot be read as an image"),
        ({"image": "https://example.org/a.png"}, "not fetched unless allow_urls says so"),
        ({"image": None}, "line 2: 'image' is empty"),
        ({"prompt": "<image><image>?"}, "has 2 places for images"),
        ({"prompt": "why " * 99}, "line 2: the prompt fills all 64"),
        ({"image": ["scans/0001.png"] * 5}, "line 2: the row's images end at token"),
        ({"rejected": "0"}, "line 2: 'chosen' and 'rejected' are the same"),
        ({"rejected": None}, "line 2: 'rejected' is null"),
        ({"remark": "x"}, "line 2: the field 'remark' is not one of a preference"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "data"])
def test_bad_rows_are_a_sentence_and_exit_code_2(
    verb: str,
    row: dict[str, Any],
    sentence: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "broken.png").write_text("no image")
    data = write(folder / "bad.jsonl", [GOOD, {**GOOD, **row}])
    words = [verb, "--task", "dpo", "--model", str(folder / "llava"), "--data", str(data)]
    words += ["--max-length", "64", "--split", "1", "0", "0", "--output", str(folder / "none")]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "bad.jsonl, line 2: " in err
    assert not (folder / "none").exists()


@pytest.mark.parametrize("verb", ["train", "data", "plan"])
@pytest.mark.parametrize(
    "words",
    [
        ["--task", "reward"],
        ["--task", "grpo", "--rewards", "json"],
        ["--task", "classify", "--text", "prompt", "--label", "chosen"],
        ["--task", "embed", "--anchor", "prompt", "--positive", "chosen"],
    ],
    ids=lambda words: words[1],
)
def test_a_task_that_reads_text_alone_refuses_images(
    verb: str, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [verb, *words, "--model", "pocket", "--data", str(folder / "digit_pairs.jsonl")]
    line += ["--method", "lora", "--output", str(folder / "none")]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert f"line 1: the row has an image, and the task '{words[1]}' reads text alone" in err
    assert "sft, dpo, kto, orpo" in err
    assert not (folder / "none").exists()


def test_a_model_that_sees_nothing_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = str(folder / "digit_pairs.jsonl")
    line = ["train", "--task", "dpo", "--model", "pocket", "--data", pairs]
    assert main([*line, "--output", str(folder / "none")]) == 2
    assert "is a model that sees none" in capsys.readouterr().err


@pytest.mark.slow
def test_the_right_digit_becomes_the_likelier_one(tmp_path: Path) -> None:
    make_vision_model(tmp_path / "qwen", "qwen2_5_vl")
    make_answers(tmp_path, make_digits(tmp_path, 400))
    words = [
        "train", "--task", "dpo", "--model", str(tmp_path / "qwen"), "--rank", "16",
        "--data", str(tmp_path / "digit_pairs.jsonl"), "--alpha", "32", "--beta", "0.5",
        "--targets", "language", "vision", "projector", "--epochs", "8", "--batch-size", "16",
        "--gradient-accumulation", "1", "--learning-rate", "4e-3", "--split", "0.8", "0", "0.2",
        "--generate-rows", "0", "--threads", "1", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(words) == 0
    run = json.loads((tmp_path / "run/run.json").read_text())
    (accuracy,) = [m for m in run["comparison"]["metrics"] if m["name"] == "accuracy"]
    assert accuracy["tuned"]["value"] > 0.8  # chance is 0.5
    assert accuracy["base"]["value"] < 0.7
    assert accuracy["p_value"] < 0.01
