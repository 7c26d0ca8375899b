"""Every verb on labels, rewards and similar texts: data, train, eval, merge, plan; and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from heads_tiny import make_encoder, make_preferences, make_rows, make_similar, write
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from inlay.cli.main import main

FLAGS = [
    "--rank", "2", "--learning-rate", "1e-3", "--batch-size", "4", "--gradient-accumulation", "1",
    "--max-steps", "4", "--threads", "1", "--split", "0.6", "0.2", "0.2",
]  # fmt: skip
DATA = {
    "single": "classify", "multi": "classify", "regression": "classify", "tokens": "classify",
    "preferences": "reward", "pairs": "embed", "triplets": "embed", "scored_pairs": "embed",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows of every kind and a small run on each."""
    found = tmp_path_factory.mktemp("heads")
    make_encoder(found / "model")
    make_preferences(found / "preferences.jsonl")
    for kind in ("single", "multi", "regression", "tokens"):
        write(found / f"{kind}.jsonl", make_rows(kind, 60))
    for kind in ("pairs", "triplets", "scored_pairs"):
        write(found / f"{kind}.jsonl", make_similar(kind))
    return found


def line_for(folder: Path, kind: str, verb: str) -> list[str]:
    start = [verb, "--task", DATA[kind], "--model", str(folder / "model")]
    return [*start, "--data", str(folder / f"{kind}.jsonl"), "--split", "0.6", "0.2", "0.2"]


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    for kind in DATA:
        line = line_for(folder, kind, "train")[:-4]
        assert main([*line, "--output", str(folder / f"run-{kind}"), *FLAGS]) == 0
    return folder


@pytest.mark.parametrize("kind", DATA)
def test_data_shows_what_will_be_predicted(
    folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = line_for(folder, kind, "data")
    assert main([*line, "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "[CLS]" in out
    expected = {
        "single": "yes", "multi": "group", "regression": "-> ", "tokens": "B-place",
        "preferences": "-> rejected", "pairs": "-> positive", "triplets": "-> negative",
        "scored_pairs": "-> positive, score ",
    }  # fmt: skip
    assert expected[kind] in out
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["parts"]) == {"train", "validation", "test"}
    assert sum(part["rows"] for part in found["parts"].values()) == 60
    assert found["parts"]["train"]["longest"] >= found["parts"]["train"]["median"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
def test_eval_measures_what_the_run_held_out(
    runs: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / f"run-{kind}"
    line = ["eval", "--adapter", str(run), "--data", str(runs / f"{kind}.jsonl")]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    own = json.loads((run / "run.json").read_text())["comparison"]
    assert found["rows_held_out_by_the_run"] is True
    names = [metric["name"] for metric in own["metrics"]]
    assert [metric["name"] for metric in found["metrics"]] == names
    for mine, theirs in zip(found["metrics"], own["metrics"], strict=True):
        for side in ("base", "tuned"):
            assert mine[side]["value"] == pytest.approx(theirs[side]["value"], rel=1e-4, abs=1e-5)
    assert ("baseline" in found) == ("baseline" in own)
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "base against tuned" in out
    assert ("untrained" in out) == ("note" in own)


@pytest.mark.slow
def test_eval_of_some_rows_of_the_runs_own_data_reads_what_it_held_out(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", "--adapter", str(runs / "run-single"), "--data", str(runs / "single.jsonl")]
    assert main([*line, "--max-rows", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows_held_out_by_the_run"] is True
    assert found["rows"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "regression", "tokens", "preferences", "pairs"])
def test_a_merged_folder_is_what_the_auto_class_reads(
    runs: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged = runs / f"run-{kind}", runs / f"merged-{kind}"
    assert main(["merge", "--adapter", str(run), "--output", str(merged), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["inputs"] == "given"
    assert report["checked"].startswith("on the written files")
    assert report["reloaded_logit_difference"] < 0.1
    auto = {
        "tokens": AutoModelForTokenClassification, "pairs": AutoModel,
    }.get(kind, AutoModelForSequenceClassification)  # fmt: skip
    plain = auto.from_pretrained(merged)
    from inlay.cli.tuned import find_tuned, load_tuned

    tuned, tokenizer = load_tuned(find_tuned(str(run)))
    assert AutoTokenizer.from_pretrained(merged).pad_token == tokenizer.pad_token
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 5, 3]])
    with torch.no_grad():
        assert torch.allclose(plain(ids)[0], tuned(ids)[0], atol=1e-4)
    if kind != "pairs":
        run_labels = json.loads((run / "run.json").read_text()).get("labels", {}).get("classes")
        expected = run_labels or ["LABEL_0"]
        assert list(plain.config.id2label.values()) == expected
    problems = {"single": "single_label_classification", "regression": "regression"}
    assert plain.config.problem_type == problems.get(kind)


@pytest.mark.slow
def test_a_merged_model_of_embeddings_is_a_sentence_transformer(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers: Any = pytest.importorskip("sentence_transformers")
    run, merged = runs / "run-triplets", runs / "merged-sentences"
    assert main(["merge", "--adapter", str(run), "--output", str(merged)]) == 0
    assert "SentenceTransformer(" in capsys.readouterr().out
    whole = transformers.SentenceTransformer(str(merged), device="cpu")
    assert whole.max_seq_length == 64
    assert whole[1].pooling_mode == "mean"
    from inlay.cli.rows import run_of
    from inlay.cli.tuned import find_tuned, load_tuned
    from inlay.data.inputs import encode_texts
    from inlay.tasks.embed.embedder import embedder

    tuned = find_tuned(str(run))
    model, tokenizer = load_tuned(tuned)
    texts = ["heart large", "no effusion seen left"]
    mine = embedder(model, run_of(tuned, {}).model, None, "auto").embed(
        encode_texts(texts, tokenizer, 64), 2
    )
    theirs = whole.encode(texts, convert_to_tensor=True)
    assert torch.allclose(mine, theirs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rows"), [("single", 3), ("preferences", 6), ("pairs", 3)])
def test_a_plan_counts_the_tasks_own_batch(
    folder: Path, kind: str, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*line_for(folder, kind, "plan"), "--method", "lora", "--batch-size", "3", "--json"]
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["largest_batch"]["rows"] == rows
    assert found["trained_parameters"] > 0
    without = [word for word in line if word not in ("--data", str(folder / f"{kind}.jsonl"))]
    assert main(without) == 0
    assert json.loads(capsys.readouterr().out)["largest_batch"]["assumed"] is True


@pytest.mark.slow
def test_a_model_with_a_head_writes_no_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", "--adapter", str(runs / "run-single"), "--prompt", "heart"]
    assert main(line) == 2
    assert "writes no text; measure it with inlay eval" in capsys.readouterr().err


@pytest.mark.slow
def test_a_column_of_another_task_is_refused(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", "--adapter", str(runs / "run-single"), "--data", str(runs / "single.jsonl")]
    assert main([*line, "--anchor", "text"]) == 2
    assert "'anchor' belongs to the task embed, not to 'classify'" in capsys.readouterr().err
    assert main([*line, "--prompt", "text", "--completion", "label"]) == 2
    assert "'prompt' does not apply to the task 'classify'" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_without_its_run_says_what_it_was_trained_for(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    for kind in ("tokens", "preferences", "pairs"):
        alone = tmp_path / kind
        shutil.copytree(runs / f"run-{kind}" / "adapter", alone)
        line = ["eval", "--adapter", str(alone), "--data", str(runs / f"{kind}.jsonl"), "--json"]
        assert main(line) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["rows"] == 60
        assert ("baseline" in found) == (kind == "preferences")
    line = ["eval", "--adapter", str(tmp_path / "tokens"), "--data", str(runs / "single.jsonl")]
    assert main(line) == 2
    assert "line 1: no field 'tokens'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "data"])
@pytest.mark.parametrize(
    ("task", "row", "sentence"),
    [
        ("classify", {"text": "heart"}, "line 41: no field 'label'"),
        ("classify", {"text": "", "label": "yes"}, "line 41: 'text' is blank"),
        ("classify", {"text": "heart", "label": ["yes"]}, "line 1: 'labels' must be a list"),
        ("reward", {"prompt": "q", "chosen": "a", "rejected": "a"}, "line 61: 'chosen' and 'reje"),
        ("reward", {"prompt": "q", "chosen": "a"}, "line 61: no field 'rejected'"),
        ("embed", {"anchor": "q"}, "line 61: no field 'positive'"),
        ("embed", {"anchor": "q", "positive": ""}, "line 61: 'positive' is blank"),
    ],
)  # fmt: skip
def test_bad_rows_are_a_sentence_and_exit_code_2(
    folder: Path,
    tmp_path: Path,
    verb: str,
    task: str,
    row: dict[str, Any],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = {"classify": "single", "reward": "preferences", "embed": "pairs"}[task]
    good = (folder / f"{kind}.jsonl").read_text().splitlines()[: 40 if task == "classify" else 60]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([*good, json.dumps(row)]))
    line = [verb, "--task", task, "--model", str(folder / "model"), "--data", str(data)]
    assert main([*line, "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    expected = sentence
    if "must be a list" in sentence:
        expected = "'label' must be a list of classes"
    assert expected in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "reward", "--packing", "bfd"], "'packing' does not apply to the task 'reward'"),
        (["--task", "reward", "--beta", "0.1"], "'beta' belongs to the task"),
        (["--task", "embed", "--text", "a"], "'text' does not apply to the task 'embed'"),
        (["--task", "embed", "--label", "a"], "'label' belongs to the task classify"),
        (["--task", "classify", "--format", "text"], "'format' does not apply"),
        (["--task", "classify", "--pooling", "mean"], "'pooling' belongs to the task embed"),
        (["--kind", "single"], "'kind' belongs to the task classify"),
        (["--task", "clasify"], "Did you mean 'classify'?"),
    ],
)
def test_a_key_that_does_not_apply_is_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--model", "pocket", "--data", "d", "--output", "o", *words]) == 2
    assert sentence in capsys.readouterr().err
