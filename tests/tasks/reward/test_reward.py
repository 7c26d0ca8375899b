from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from heads_tiny import make_reward, write
from train_tiny import losses_of, silence

import inlay
from inlay.data.preference import normalise_pairs
from inlay.data.read import read_rows
from inlay.errors import DataError, ModelError, TrainingError
from inlay.model.load.heads import Head
from inlay.model.load.pretrained import load
from inlay.tasks import TASKS
from inlay.tasks.reward.pairs import encode_reward_pairs
from inlay.train.rows import rows_of_run
from inlay.train.run import TrainResult, train


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(make_reward(tmp_path_factory.mktemp("reward"), epochs=6.0))


def test_a_run_learns_which_answer_is_preferred(done: TrainResult):
    run = done.run
    metrics = {m["name"]: m for m in run["comparison"]["metrics"]}
    assert list(metrics) == ["accuracy", "margin", "loss"]
    assert metrics["accuracy"]["tuned"]["value"] >= 0.8
    assert metrics["loss"]["p_value"] < 0.05
    coin = {m["name"]: m for m in run["comparison"]["baseline"]["metrics"]}
    assert coin["accuracy"]["base"]["value"] == 0.5
    assert coin["loss"]["base"]["value"] == pytest.approx(math.log(2))
    lines = losses_of(done.folder.path)
    steps, held = ([x for x in lines if name in x] for name in ("loss", "eval_loss"))
    assert steps[-1]["reward_accuracy"] > 0.8
    assert held[-1]["eval_reward_margin"] > held[0]["eval_reward_margin"]
    assert run["task"] == "reward"
    extras = json.loads((done.folder.adapter / "inlay.json").read_text())
    assert extras["head"] == {"purpose": "sequence", "labels": ["LABEL_0"], "problem": None}


def test_the_comparison_is_that_of_the_models_rewards(done: TrainResult):
    from inlay.tasks.config import checked_config

    assert done.model is not None
    assert done.tokenizer is not None
    rows = rows_of_run(checked_config(done.run["config"])).test.rows
    margins: list[float] = []
    for row in rows:
        sides: list[float] = []
        for side in ("chosen", "rejected"):
            text = row["prompt"] + row[side] + done.tokenizer.eos_token
            ids = done.tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                sides.append(float(done.model(ids).logits))
        margins.append(sides[0] - sides[1])
    metrics = {m["name"]: m for m in done.run["comparison"]["metrics"]}
    assert metrics["margin"]["tuned"]["value"] == pytest.approx(
        sum(margins) / len(margins), abs=1e-3
    )


def test_an_adapter_without_gradient_stops_the_run(tmp_path: Path):
    config = make_reward(tmp_path, targets=["v_proj"])
    silence(config.model, layer=1)
    with pytest.raises(TrainingError, match=r"no gradient .*layers\.1\.self_attn\.v_proj"):
        train(config)


@pytest.mark.parametrize(
    "changes",
    [{"storage": "nf4"}, {"base": "encoder"}, {"base": "encoder", "storage": "int8"},
     {"method": "dora"}, {"activations": "layer-inputs"}],
    ids=str,
)  # fmt: skip
def test_every_kind_of_run_learns(tmp_path: Path, changes: dict[str, Any]):
    train(make_reward(tmp_path, epochs=6.0, evaluate=False, **changes))
    held = [x["eval_loss"] for x in losses_of(tmp_path / "out") if "eval_loss" in x]
    assert held[-1] < held[0] - 0.05


def encoded(folder: Path, rows: list[dict[str, Any]], longest: int = 64) -> list[Any]:
    config = make_reward(folder)
    _, tokenizer = load(config.model)
    pairs = normalise_pairs(read_rows(write(folder / "rows.jsonl", rows)))
    return encode_reward_pairs(pairs, tokenizer, longest)


def test_an_answer_is_followed_by_the_end_token(tmp_path: Path):
    _, tokenizer = load(make_reward(tmp_path).model)
    (pair,) = encoded(tmp_path, [{"prompt": "heart", "chosen": "clear", "rejected": "no"}])
    assert pair.chosen.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(pair.chosen.input_ids[:-1]) == "heart clear"
    assert max(len(side.input_ids) for side in (pair.chosen, pair.rejected)) == 3


def test_two_sides_that_are_the_same_once_cut_are_named(tmp_path: Path):
    row = {"prompt": "heart lungs", "chosen": "clear no", "rejected": "clear left"}
    with pytest.raises(DataError, match=r"line 1: cut at 3 tokens, .* max_length 5 keeps both"):
        encoded(tmp_path, [row], 3)


def test_conversations_need_a_chat_template(tmp_path: Path):
    row = {
        "prompt": [{"role": "user", "content": "heart"}],
        "chosen": [{"role": "assistant", "content": "clear"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    with pytest.raises(ModelError, match="no chat template"):
        encoded(tmp_path, [row])


def test_only_a_model_of_one_number_gives_rewards(tmp_path: Path):
    config = make_reward(tmp_path)
    model, _ = load(config.model, head=Head("sequence", ("a", "b")))
    inlay.attach(model, inlay.LoRA(rank=2))
    with pytest.raises(ModelError, match="gives no reward, which is one number a row"):
        TASKS["reward"].run(config).recall(model, rows_of_run(config).test, {})
