"""Every verb on rows with images, and what each refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from verbs import as_json
from vision_tiny import QUESTION, make_digits, make_vision_model

from inlay.cli.main import main
from inlay.model.load.pretrained import load

TRAIN = [
    "train", "--max-steps", "3", "--rank", "4", "--learning-rate", "1e-2", "--batch-size", "4",
    "--targets", "language", "projector", "--generate-rows", "2", "--generate-tokens", "3",
    "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, scans of digits and a short run."""
    folder = tmp_path_factory.mktemp("images")
    make_vision_model(folder / "llava", "llava")
    data = make_digits(folder, 30)
    where = ["--model", str(folder / "llava"), "--data", str(data)]
    assert main([*TRAIN, *where, "--output", str(folder / "run")]) == 0
    return folder


def test_data_shows_images_as_one_token_with_their_count(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", str(run / "digits.jsonl"), "--model", str(run / "llava"), "--show", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "rows of images" in out
    assert f"<|user|><image> x 16 {QUESTION}<|end|><|assistant|>[0<|end|>]" in out
    found = as_json(capsys, *words)
    assert found["kind"] == "images"
    assert found["parts"]["train"]["rows"] == 24


def test_eval_measures_the_rows_that_the_run_held_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--adapter", str(run / "run"), "--generate-rows", "2"]
    found = as_json(capsys, *words, "--data", str(run / "digits.jsonl"))
    own = json.loads((run / "run/run.json").read_text())["comparison"]
    assert found["rows_held_out_by_the_run"] is True
    for name in ("loss", "exact_match"):
        values = [
            next(m["tuned"]["value"] for m in record["metrics"] if m["name"] == name)
            for record in (found, own)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_generate_answers_a_question_about_an_image(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--generate-tokens", "3"]
    asked = ["--prompt", QUESTION, "--image", str(run / "scans/0000.png")]
    tuned = as_json(capsys, *words, "--adapter", str(run / "run"), *asked, "--base")
    assert set(tuned[0]) == {"prompt", "text", "base"}
    plain = as_json(capsys, *words, "--model", str(run / "llava"), *asked)
    assert plain[0]["text"] == tuned[0]["base"]
    rows = as_json(
        capsys, *words, "--adapter", str(run / "run"), "--data", str(run / "digits.jsonl")
    )
    assert [row["expected"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["text"] == tuned[0]["text"]


def test_merge_writes_the_processor_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = run / "merged"
    report = as_json(capsys, "merge", "--adapter", str(run / "run"), "--output", str(merged))
    assert report["inputs"] == "given"
    assert report["checked"].startswith("on the written files, read back by AutoModelFor")
    assert report["reloaded_logit_difference"] < 0.1
    model, processor = load(str(merged))
    assert type(processor).__name__ == "LlavaProcessor"
    plain = AutoModelForImageTextToText.from_pretrained(merged)
    ids = torch.arange(100, 120)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    asked = ["--prompt", QUESTION, "--image", str(run / "scans/0001.png")]
    texts = [
        as_json(capsys, "generate", *where, *asked, "--generate-tokens", "3")[0]["text"]
        for where in (["--model", str(merged)], ["--adapter", str(run / "run")])
    ]
    assert texts[0] == texts[1]


def test_a_plan_is_of_a_step_with_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--method", "lora", "--model", str(run / "llava"), "--rank", "4"]
    words += ["--batch-size", "4"]
    found = as_json(capsys, *words, "--data", str(run / "digits.jsonl"))
    own = json.loads((run / "run/run.json").read_text())
    assert found["trained_parameters"] == plan_of_language(run)
    assert own["memory"]["planned_bytes"] > 0
    assert main(words) == 0
    assert "images are not counted: there were no rows to read" in capsys.readouterr().out


def plan_of_language(run: Path) -> int:
    """Return how many parameters train where the language part alone is adapted."""
    import inlay

    model = inlay.attach(load(str(run / "llava"))[0], inlay.LoRA(rank=4), targets="language")
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"image": "gone.png"}, "line 2: 'image': "),
        ({"image": "broken.png"}, "broken.png cannot be read as an image"),
        ({"image": "https://example.org/a.png"}, "not fetched unless allow_urls says so"),
        ({"image": None}, "line 2: 'image' is empty"),
        ({"image": "scans/0001.png", "prompt": "<image><image>?"}, "has 2 places for images"),
        ({"image": "scans/0001.png", "prompt": "why " * 99}, "line 2: the prompt fills all 64"),
        ({"image": ["scans/0001.png"] * 5}, "line 2: the row's images end at token"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "data"])
def test_bad_rows_are_a_sentence_and_exit_code_2(
    verb: str,
    row: dict[str, Any],
    sentence: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run / "broken.png").write_text("no image")
    good = {"image": "scans/0000.png", "prompt": QUESTION, "completion": "0"}
    data = run / "bad.jsonl"
    data.write_text(json.dumps(good) + "\n" + json.dumps({**good, **row}) + "\n")
    words = [verb, "--model", str(run / "llava"), "--data", str(data), "--max-length", "64"]
    words += ["--split", "1", "0", "0", "--output", str(run / "none")]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "bad.jsonl, line 2: " in err
    assert not (run / "none").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--packing", "bfd"], "'packing' does not apply to rows with images"),
        (["train", "--eight-bits"], "'eight_bits' does not apply to rows with images"),
        (["train", "--max-pixels", "0"], "'max_pixels' must be a whole number above 0"),
        (["train", "--model", "pocket"], "is a model that sees none"),
        (["data", "--model", "pocket"], "is a model that sees none"),
    ],
)
def test_what_does_not_apply_is_refused(
    words: list[str], sentence: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *rest = words
    model = [] if "--model" in rest else ["--model", str(run / "llava")]
    line = [verb, *model, "--data", str(run / "digits.jsonl"), "--output", str(run / "none"), *rest]
    assert main(line) == 2
    assert sentence in capsys.readouterr().err


def test_what_a_processor_needs_and_is_not_installed_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vision_model(run / "smolvlm", "smolvlm")
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    words = ["--model", str(run / "smolvlm"), "--data", str(run / "digits.jsonl")]
    for verb in (["data"], ["train", "--output", str(run / "none")]):
        assert main([*verb, *words]) == 2
        err = capsys.readouterr().err
        assert "smolvlm cannot be used: ImportError: Package `num2words` is required" in err
        assert "pip install num2words" in err
    assert not (run / "none").exists()


def test_an_image_needs_a_question_and_a_file(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["generate", "--model", str(run / "llava")]
    assert main([*start, "--data", str(run / "digits.jsonl"), "--image", "x.png"]) == 2
    assert "--image needs --prompt" in capsys.readouterr().err
    assert main([*start, "--prompt", QUESTION, "--image", "x.png"]) == 2
    assert "--image x.png: " in capsys.readouterr().err
    text = ["generate", "--model", "pocket", "--prompt", "p"]
    assert main([*text, "--image", str(run / "scans/0000.png")]) == 2
    assert "sees none" in capsys.readouterr().err


@pytest.mark.slow
def test_digits_are_learned_far_above_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_vision_model(tmp_path / "qwen", "qwen2_5_vl")
    data = make_digits(tmp_path, 400)
    words = [
        "train", "--model", str(tmp_path / "qwen"), "--data", str(data), "--rank", "16",
        "--alpha", "32", "--targets", "language", "vision", "projector", "--epochs", "8",
        "--batch-size", "16", "--gradient-accumulation", "1", "--learning-rate", "4e-3",
        "--split", "0.8", "0", "0.2", "--generate-rows", "80", "--generate-tokens", "2",
        "--threads", "1", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(words) == 0
    run = json.loads((tmp_path / "run/run.json").read_text())
    metrics = {m["name"]: m for m in run["comparison"]["metrics"]}
    assert metrics["exact_match"]["tuned"]["value"] > 0.5  # chance is 0.1
    assert metrics["exact_match"]["base"]["value"] < 0.2
