from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from heads_tiny import make_classify, make_rows, write
from train_tiny import losses_of

import inlay
from inlay.cli.main import main
from inlay.data.inputs import InputRow
from inlay.errors import DataError, TrainingError, UsageError
from inlay.memory.devices import this_machine
from inlay.model.load.heads import Head
from inlay.model.load.pretrained import load
from inlay.run.config import RunConfig
from inlay.tasks.classify.trainer import PadLabelled, columns
from inlay.tasks.config import load_config
from inlay.train.collate import items_of
from inlay.train.planning import rows_to_plan
from inlay.train.run import TrainResult, train

KINDS = ("single", "multi", "regression", "tokens")
METRICS = {
    "single": ["loss", "accuracy", "macro_f1"],
    "multi": ["loss", "exact_labels", "micro_f1", "macro_f1"],
    "regression": ["rmse", "mae", "pearson", "spearman"],
    "tokens": ["loss", "tag_accuracy", "entity_f1"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    """A run to the end for every kind of label."""
    folder = tmp_path_factory.mktemp("classify")
    keys = {"epochs": 12.0, "learning_rate": 3e-3}
    return {kind: train(make_classify(folder, kind, kind=kind, **keys)) for kind in KINDS}


def metrics_of(run: dict[str, Any]) -> dict[str, Any]:
    return {metric["name"]: metric for metric in run["comparison"]["metrics"]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_label_is_learned(runs: dict[str, TrainResult], kind: str):
    run = runs[kind].run
    assert list(metrics_of(run)) == METRICS[kind]
    baseline = {m["name"]: m for m in run["comparison"]["baseline"]["metrics"]}
    first = METRICS[kind][0]
    assert baseline[first]["tuned"]["value"] < 0.8 * baseline[first]["base"]["value"]
    assert baseline[first]["p_value"] < 0.05
    assert metrics_of(run)[first]["difference"]["value"] < 0
    assert "untrained" in run["comparison"]["note"]
    assert run["labels"]["kind"] == kind
    assert run["memory"]["planned_bytes"] > 0


def test_a_run_leaves_what_a_supervised_one_does(runs: dict[str, TrainResult]):
    result = runs["single"]
    output = result.folder.path
    assert {p.name for p in output.iterdir()} == {
        "adapter", "checkpoints", "metrics.jsonl", "report.html", "run.json",
    }  # fmt: skip
    run = json.loads((output / "run.json").read_text())
    assert run["task"] == "classify"
    assert run["labels"]["classes"] == ["no", "yes"]
    assert run["config"]["packing"] is False
    assert sum(map(sum, run["comparison"]["confusion"])) == run["rows"]["test"]
    assert [c["label"] for c in run["comparison"]["classes"]] == ["no", "yes"]
    lines = losses_of(output)
    held = [line for line in lines if "eval_loss" in line]
    assert held[-1]["eval_accuracy"] > held[0]["eval_accuracy"]
    page = (output / "report.html").read_text()
    assert "Baseline against tuned" in page
    assert "Macro F1" in page
    assert result.model is not None
    assert not result.model.training


def test_a_model_whose_own_head_knows_most_rows_trains_on_those_it_does_not(tmp_path: Path):
    first = make_classify(tmp_path, epochs=12.0, learning_rate=3e-3)
    train(first)
    known = ["merge", "--adapter", first.output, "--output", str(tmp_path / "known")]
    assert main(known) == 0
    rows = [
        {**row, "label": "no" if row["label"] == "yes" else "yes"} if i % 10 == 3 else row
        for i, row in enumerate(make_rows("single"))
    ]
    write(tmp_path / "wrong.jsonl", rows)
    again = make_classify(
        tmp_path, "again", base="known", data=str(tmp_path / "wrong.jsonl"), learning_rate=1e-4,
        eval_data=str(tmp_path / "single.jsonl"),
    )  # fmt: skip
    result = train(again)
    start = next(x["eval_loss"] for x in losses_of(again.output) if "eval_loss" in x)
    assert start < 0.1
    assert result.run["finished"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_alone_brings_the_head_back(runs: dict[str, TrainResult], kind: str):
    from inlay.cli.tuned import find_tuned, load_tuned

    result = runs[kind]
    assert result.model is not None
    again, _ = load_tuned(find_tuned(str(result.folder.adapter)))
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 5, 3]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, result.model(input_ids=ids).logits)
    assert again.config.id2label == result.model.config.id2label


def test_the_comparison_is_that_of_the_models_logits(runs: dict[str, TrainResult], tmp_path: Path):
    result = runs["single"]
    assert result.model is not None
    assert result.tokenizer is not None
    from inlay.tasks.config import checked_config
    from inlay.train.rows import rows_of_run

    rows = rows_of_run(checked_config(result.run["config"])).test.rows
    right = 0
    for row in rows:
        encoded = result.tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            number = int(result.model(**encoded).logits.argmax())
        right += result.model.config.id2label[number] == row["label"]
    assert metrics_of(result.run)["accuracy"]["tuned"]["value"] == pytest.approx(right / len(rows))


# A run that goes wrong.


def test_an_adapter_without_gradient_stops_the_run(tmp_path: Path):
    config = make_classify(tmp_path, targets=["value"])
    model, tokenizer = load(config.model, head=Head("embedding"))
    with torch.no_grad():
        model.encoder.layer[1].attention.output.dense.weight.zero_()
    model.save_pretrained(config.model)
    tokenizer.save_pretrained(config.model)
    with pytest.raises(
        TrainingError, match=r"no gradient reaches .*layer\.1\.attention\.self\.val"
    ):
        train(config)
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("rows", "keys", "sentence"),
    [
        ([{"text": f"t{i}", "label": "a"} for i in range(20)], {}, "only the class 'a'"),
        ([*make_rows("single", 30), {"text": "x", "label": "new"}], {}, "the label 'new' is of no"),
    ],
)
def test_nothing_is_written_for_bad_labels(
    tmp_path: Path, rows: list[dict[str, Any]], keys: dict[str, Any], sentence: str
):
    make_classify(tmp_path)
    eval_data = write(tmp_path / "more.jsonl", rows)
    data = tmp_path / "single.jsonl" if "new" in sentence else eval_data
    config = make_classify(
        tmp_path, data=str(data), **keys,
        **({"eval_data": str(eval_data)} if "new" in sentence else {}),
    )  # fmt: skip
    with pytest.raises(DataError, match=sentence):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": "bfd"}, "'packing' does not apply to the task 'classify'"),
        ({"eight_bits": True}, "'eight_bits' does not apply"),
        ({"cache_trunk": True}, "'cache_trunk' does not apply"),
        ({"prompt": "a", "completion": "b"}, "'prompt' does not apply"),
        ({"format": "alpaca"}, "'format' does not apply"),
        ({"beta": 0.1}, "'beta' belongs to the tasks dpo, grpo, kto and orpo, not to 'classify'"),
        ({"anchor": "a"}, "'anchor' belongs to the task embed"),
        ({"kind": "some"}, "'kind' must be one of"),
        ({"task": "sft", "label": "a"}, "'label' belongs to the task classify, not to 'sft'"),
    ],
)
def test_a_key_the_task_does_not_know_is_refused_by_name(changes: dict[str, Any], sentence: str):
    run = {"model": "m", "data": "d", "output": "o", "task": "classify", **changes}
    with pytest.raises(UsageError) as caught:
        load_config(None, run)
    assert sentence in str(caught.value)


# Storages, methods, models.


@pytest.mark.parametrize(
    "changes",
    [
        {"storage": "nf4"},
        {"storage": "int8", "base": "causal"},
        {"base": "causal", "activations": "layer-inputs"},
        {"base": "causal", "kind": "tokens"},
        {"method": "dora"},
        {"base": "causal", "storage": "nf4", "stream": "disk"},
        {"method": "full", "learning_rate": 3e-3},
        {"kind": "tokens", "storage": "nf4"},
        {"method": "prompt", "kind": "tokens"},
        {"method": "prefix", "learning_rate": 1e-1},
    ],
    ids=str,
)
def test_every_kind_of_run_learns(tmp_path: Path, changes: dict[str, Any]):
    keys = {"epochs": 6.0, "learning_rate": 3e-3, "evaluate": False}
    train(make_classify(tmp_path, **{**keys, **changes}))
    held = [x["eval_loss"] for x in losses_of(tmp_path / "out") if "eval_loss" in x]
    assert min(held) < held[0] - 0.1


def test_rows_longer_than_the_model_are_cut_and_the_run_says_so(tmp_path: Path):
    notes: list[str] = []
    config = make_classify(tmp_path, evaluate=False, max_steps=2)
    held_out = write(tmp_path / "held.jsonl", make_rows("single", 20))
    long = [{"text": " ".join(["heart"] * 90), "label": "yes"}, *make_rows("single", 40)]
    write(tmp_path / "single.jsonl", long)
    train(
        load_config(None, {**config.model_dump(), "eval_data": str(held_out)}),
        on_event=lambda event: notes.append(event.message),
    )
    assert "the model takes rows of 64 tokens, fewer than max_length" in notes
    assert "1 rows cut at 64 tokens (lines 1)" in notes
    assert any(note.startswith("kind single: 2 classes (") for note in notes)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_rows_leave_room_for_virtual_tokens(tmp_path: Path, method: str):
    notes: list[str] = []
    config = make_classify(tmp_path, evaluate=False, max_steps=1, method=method, tokens=5)
    long = [{"text": " ".join(["heart"] * 90), "label": "yes"}, *make_rows("single", 40)]
    write(tmp_path / "single.jsonl", long)
    train(config, on_event=lambda event: notes.append(event.message))
    assert "the model takes rows of 32 tokens, fewer than max_length" in notes
    with pytest.raises(UsageError, match="tokens is 40, and the model takes 64 tokens in all"):
        train(make_classify(tmp_path, "other", method=method, tokens=40))


def test_the_loss_of_tags_is_the_mean_over_the_whole_batch(tmp_path: Path):
    losses: list[float] = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        config = make_classify(
            tmp_path, f"{size}", kind="tokens", batch_size=size, max_steps=1, evaluate=False,
            gradient_accumulation=accumulation, split=[1.0, 0.0, 0.0], max_rows=8, dtype="float32",
        )  # fmt: skip
        without_dropout(config)
        train(config)
        losses.append(next(x["loss"] for x in losses_of(config.output) if "loss" in x))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def without_dropout(config: RunConfig) -> None:
    path = Path(config.model) / "config.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps({**values, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0})
    )


def test_the_plan_is_made_of_the_tasks_own_step(tmp_path: Path):
    config = make_classify(tmp_path, kind="tokens")
    planned = rows_to_plan(config, this_machine(), has_data=True)(config)
    assert planned.head is not None
    assert planned.head.labels == ("O", "B-place", "I-place")
    assert planned.batch["labels"].shape == planned.batch["input_ids"].shape
    assumed = rows_to_plan(config, this_machine(), has_data=False)(config)
    assert (assumed.assumed, assumed.batch["input_ids"].shape) == (True, (4, 64))


def test_padding_is_no_input_and_has_no_label():
    rows = [InputRow([5, 6, 7], 3, [1, -100, 0]), InputRow([8], 1, [1])]
    found = PadLabelled(9, 1, of_tokens=True)(items_of(columns(rows)))
    assert found["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found["labels"].tolist() == [[1, -100, 0], [1, -100, -100]]


def test_the_head_is_what_the_library_offers(tmp_path: Path):
    config = make_classify(tmp_path)
    model, tokenizer = inlay.load(config.model, head=inlay.Head("sequence", ("no", "yes")))
    assert model.classifier.weight.shape == (2, 32)
    assert tokenizer.pad_token_id == 0
