"""A run on judged answers about images: the loss of its steps, what it keeps, and how it stops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from train_tiny import adapter_hash, broken_at, losses_of, one_model, stages_of, what_is_left
from trl.trainer import dpo_trainer
from vision_tiny import FAMILIES, check_kept_features, make_vision_run, notes_of, silence_projector

from inlay.data.image_reader import ImageReader
from inlay.errors import DataError, TrainingError, UsageError
from inlay.model.adapters.attach import disabled
from inlay.model.adapters.registry import adapter_places
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.tasks.dpo.trainer import PreferenceTrainer
from inlay.tasks.kto.trainer import LabelledTrainer
from inlay.tasks.orpo.trainer import OddsTrainer
from inlay.train.adapted_model import load_adapted
from inlay.train.output import checkpoints
from inlay.train.run import TrainResult, train

TRAINERS: dict[str, type[Any]] = {
    "dpo": PreferenceTrainer, "orpo": OddsTrainer, "kto": LabelledTrainer,
}  # fmt: skip
quick_for_dpo = pytest.mark.parametrize(
    "task", ["dpo", *(pytest.param(task, marks=pytest.mark.slow) for task in ("orpo", "kto"))]
)


def make_judged(folder: Path, task: str = "dpo", output: str = "out", **changes: Any) -> RunConfig:
    """Return a short run on which of two digits a scan shows."""
    keys: dict[str, Any] = {"task": task, "count": 200, "many": 2, "beta": 1.0, "warmup": 0}
    keys |= {"split": [0.6, 0.2, 0.2], "targets": ["language"], "generate_rows": 0}
    return make_vision_run(folder, output=output, **{**keys, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, TrainResult, str]:
    with one_model(dpo_trainer):
        folder = tmp_path_factory.mktemp("dpo")
        config = make_judged(folder, generate_rows=2, epochs=6.0)
        return (config, *notes_of(config))


def test_the_better_answer_about_an_image_is_preferred(done: tuple[RunConfig, TrainResult, str]):
    config, result, told = done
    run, page = what_is_left(config, result)
    assert "ran once over" in told
    held = [line for line in losses_of(config.output) if "eval_loss" in line]
    assert held[0]["eval_loss"] == pytest.approx(math.log(2))
    assert held[0]["eval_reward_margin"] == 0
    assert held[-1]["eval_loss"] < 0.4
    assert held[-1]["eval_reward_accuracy"] > 0.8
    metrics = {m["name"]: m for m in run["comparison"]["metrics"]}
    assert metrics["accuracy"]["tuned"]["value"] > metrics["accuracy"]["base"]["value"]
    assert metrics["accuracy"]["tuned"]["value"] > 0.8
    assert metrics["loss"]["base"]["value"] == pytest.approx(math.log(2))
    assert run["comparison"]["examples"][0]["prompt"] == "Which digit is this?"
    assert "Reward accuracy" in page
    assert not list(Path(config.output).rglob("*.tmp"))


# The loss, written out from the model's own logits.


def log_prob(model: Any, reader: ImageReader, row: dict[str, Any], answer: str) -> Tensor:
    """Return an answer's log-probability from the processor's own inputs and every logit."""
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    images = [picture.open() for picture in row["images"]]
    whole = reader.inputs(reader.written([*row["prompt"], said]), images)
    prompt = reader.inputs(reader.written(row["prompt"], generate=True), images)
    logits = model(**whole, use_cache=False).logits[0].log_softmax(-1)
    ids, start = whole["input_ids"][0], prompt["input_ids"].shape[1]
    places = torch.arange(start, len(ids))
    return logits[places - 1, ids[places]].sum()


def by_hand(model: Any, reader: ImageReader, rows: list[dict[str, Any]], beta: float) -> Tensor:
    """Return -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)), the mean."""
    losses: list[Tensor] = []
    for row in rows:
        own = [log_prob(model, reader, row, row[side]) for side in ("chosen", "rejected")]
        with disabled(model), torch.no_grad():
            base = [log_prob(model, reader, row, row[side]) for side in ("chosen", "rejected")]
        losses.append(-logsigmoid(beta * ((own[0] - base[0]) - (own[1] - base[1]))))
    return torch.stack(losses).mean()


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kept", [False, True], ids=["seen", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_the_papers_written_out(tmp_path: Path, family: str, kept: bool):
    targets = ["language"] if kept or family == "gemma3" else ["language", "projector"]
    config = make_judged(
        tmp_path, family=family, count=8, many=10, beta=2.0, dropout=None, targets=targets,
        split=[1.0, 0.0, 0.0], cache_vision=kept,
    )  # fmt: skip
    stages = stages_of(config)
    tokens, _ = stages.tokens()
    model, tokenizer = load_adapted(stages.config, stages.method, None)
    torch.manual_seed(3)
    for _, params in adapter_places(model, "default"):
        for tensor in params.parameters():
            torch.nn.init.normal_(tensor, std=0.2)
    setup = stages.setup(model, tokenizer, tokens, {"learning_rate": {"value": 1e-3}})
    stages.task.keep_features(setup)
    with stages.task.reading():
        trainer: Any = stages.task.trainer(setup)
    assert trainer.ref_model is None
    model.train()
    with stages.task.reading():
        loss = trainer.compute_loss(model, trainer.batch_of([0, 1, 2, 3, 4]))
        found = gradients(model, loss)
    wanted = by_hand(model, stages.task.reader, tokens.train_rows.rows[:5], 2.0)
    assert wanted.item() != pytest.approx(math.log(2), rel=0.01)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-5)
    for name, gradient in gradients(model, wanted).items():
        apart = (found[name] - gradient).norm() / gradient.norm()
        assert apart.item() < 1e-3, name


@quick_for_dpo
def test_kept_features_train_the_same(tmp_path: Path, task: str):
    def make(name: str, wanted: Any) -> RunConfig:
        keys = {"cache_vision": wanted, "evaluate": False, "epochs": 1.0}
        return make_judged(tmp_path, task, name, **keys)

    check_kept_features(make, "ran once over")


OF_TASK = {"orpo": ("eval_accuracy", "accuracy"), "kto": ("eval_reward_auc", "auc")}


@pytest.mark.parametrize("task", OF_TASK)
def test_other_judged_answers_learn_too(tmp_path: Path, task: str):
    rate = {"learning_rate": 2e-2} if task == "kto" else {}
    config = make_judged(tmp_path, task, epochs=6.0, **rate)
    run, _ = what_is_left(config, train(config))
    key, name = OF_TASK[task]
    held = [line for line in losses_of(config.output) if "eval_loss" in line]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"]
    assert held[-1][key] > 0.7
    metrics = {m["name"]: m for m in run["comparison"]["metrics"]}
    assert metrics[name]["tuned"]["value"] > 0.7


@pytest.mark.parametrize(
    ("task", "family"),
    [("dpo", "qwen2_5_vl"), ("dpo", "smolvlm"), ("dpo", "gemma3"), ("orpo", "gemma3"),
     ("kto", "qwen3_vl"), ("kto", "gemma3")],
)  # fmt: skip
def test_other_families_take_a_step(tmp_path: Path, task: str, family: str):
    config = make_judged(
        tmp_path, task, family=family, count=60, max_steps=1, log_every=1, evaluate=False
    )
    assert train(config).run["finished"]
    (step,) = [line for line in losses_of(config.output) if "loss" in line]
    assert math.isfinite(step["loss"])


def test_image_tokens_are_not_counted_where_the_prompt_is(tmp_path: Path):
    from inlay.data.image_reader import image_reader
    from inlay.tasks.dpo.pairs import encode_pairs
    from inlay.train.rows import rows_of_run

    config = make_judged(tmp_path, "orpo", count=20)
    reader = image_reader(Path(config.model), None)
    for pair in encode_pairs(rows_of_run(config).train, reader, 512):
        ids, counted = pair.whole.input_ids, pair.whole.trained
        seen = [token in reader.image_tokens for token in ids]
        assert sum(seen) == 16
        assert counted == [not image for image in seen]


# A run that goes wrong.


@quick_for_dpo
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
):
    same = {"log_every": 3, "evaluate": False, "max_steps": 8, "epochs": 2.0}
    config = make_judged(tmp_path, task, resume=True, **same)
    broken_at(monkeypatch, TRAINERS[task], 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config)
    train(make_judged(tmp_path, task, "whole", **same))
    assert adapter_hash(config.output) == adapter_hash(tmp_path / "whole")
    assert losses_of(config.output) == losses_of(tmp_path / "whole")


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_judged(tmp_path, resume=True, max_steps=8, evaluate=False, learning_rate=1e-4)
    broken_at(monkeypatch, PreferenceTrainer, 7, float("nan"))
    with pytest.raises(TrainingError, match="the loss became nan at step 7"):
        train(config)
    last = checkpoints.latest(tmp_path / "out" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-6"
    monkeypatch.undo()
    assert train(config).run["finished"]


def test_an_adapter_without_gradient_stops_the_run(tmp_path: Path):
    config = make_judged(tmp_path, targets=["vision"])
    silence_projector(Path(config.model))
    with pytest.raises(TrainingError, match=r"no gradient reaches .*vision_tower"):
        train(config)
    assert not (tmp_path / "out" / "adapter").exists()


def test_pairs_without_images_know_no_such_key(tmp_path: Path):
    from train_tiny import make_task

    with pytest.raises(UsageError, match="'max_pixels' applies to rows with images, and these"):
        train(make_task("dpo", tmp_path, max_pixels=64))
    assert not (tmp_path / "out").exists()


BLIND = {
    "reward": {},
    "grpo": {"rewards": ["json"], "num_generations": 2},
    "classify": {"text": "prompt", "label": "chosen"},
    "embed": {"anchor": "prompt", "positive": "chosen"},
}


@pytest.mark.parametrize("task", BLIND)
def test_a_task_that_reads_text_alone_refuses_images(tmp_path: Path, task: str):
    pairs = make_judged(tmp_path, count=20)
    run = {"model": pairs.model, "data": pairs.data, "output": str(tmp_path / "out")}
    config = load_config(None, {**run, "task": task, **BLIND[task]})
    sentence = f"line 1: the row has an image, and the task '{task}' reads text alone; take the"
    with pytest.raises(DataError, match=sentence):
        train(config)
    assert not (tmp_path / "out").exists()


def test_a_column_of_words_is_no_image_to_a_task_that_reads_text(tmp_path: Path):
    from inlay.train.rows import rows_of_run

    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"seen {n}", "image": ("scan", "photo")[n % 2]} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    run = {"model": "m", "data": str(path), "output": "o", "task": "classify", "text": "text"}
    assert rows_of_run(load_config(None, {**run, "label": "image"})).train.kind == "class"


def test_held_out_rows_of_another_kind_are_said(tmp_path: Path):
    config = make_judged(tmp_path, count=20)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    changed = config.model_copy(update={"eval_data": str(text)})
    with pytest.raises(DataError, match=r"pairs.jsonl have images and those of .*text.jsonl have"):
        train(changed)


# Storages, methods, options.


@pytest.mark.parametrize(
    "changes",
    [
        {"storage": "nf4", "dtype": "bfloat16"},
        pytest.param({"storage": "nf4", "stream": "host"}, marks=pytest.mark.slow),
        {"targets": ["language", "vision", "projector"], "activations": "layer-inputs"},
        pytest.param({"batch_size": 8, "max_pixels": 16}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_kind_of_run_learns(tmp_path: Path, changes: dict[str, Any]):
    train(make_judged(tmp_path, evaluate=False, epochs=5.0, **changes))
    held = [x["eval_loss"] for x in losses_of(tmp_path / "out") if "eval_loss" in x]
    assert held[0] == pytest.approx(math.log(2), abs=1e-5)
    assert held[-1] < held[0] - 0.1
