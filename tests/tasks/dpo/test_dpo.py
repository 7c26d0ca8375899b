from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from train_tiny import (
    KINDS,
    adapter_hash,
    check_refused,
    losses_of,
    make_task,
    one_model,
    trainer_on,
    what_is_left,
)
from trl.trainer import dpo_trainer

from inlay.data.text_reader import TextReader
from inlay.errors import DataError
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach, disabled
from inlay.model.adapters.registry import adapter_places
from inlay.model.load.pretrained import load
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.tasks.dpo.compare import log_probs
from inlay.tasks.dpo.pairs import encode_pairs
from inlay.train.recipe import learning_rate
from inlay.train.rows import rows_of_run
from inlay.train.run import TrainResult, train
from inlay.train.trl import left_as_it_was

make_dpo = partial(make_task, "dpo")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, TrainResult]:
    with one_model(dpo_trainer):
        config = make_dpo(tmp_path_factory.mktemp("dpo"), epochs=6.0)
        return config, train(config)


def test_a_run_leaves_what_a_supervised_one_does(done: tuple[RunConfig, TrainResult]):
    config, result = done
    run, page = what_is_left(config, result)
    assert run["config"]["beta"] == 1.0
    assert run["config"]["packing"] is False
    assert run["steps"] == 36
    assert "Reward accuracy" in page


def test_metrics_are_the_tasks_own(done: tuple[RunConfig, TrainResult]):
    lines = losses_of(done[0].output)
    held, steps = ([x for x in lines if name in x] for name in ("eval_loss", "loss"))
    assert held[0]["eval_loss"] == pytest.approx(math.log(2))
    assert held[0]["eval_reward_margin"] == 0
    assert held[-1]["eval_loss"] < 0.5
    assert held[-1]["eval_reward_accuracy"] == 1
    assert held[-1]["eval_reward_margin"] > 1
    assert (steps[0]["loss"], steps[0]["reward_margin"]) == (pytest.approx(math.log(2)), 0)
    assert steps[-1]["reward_accuracy"] > 0.8


def test_base_and_tuned_are_compared_on_held_out_pairs(done: tuple[RunConfig, TrainResult]):
    metrics = {m["name"]: m for m in done[1].run["comparison"]["metrics"]}
    assert list(metrics)[:5] == [
        "accuracy", "margin", "loss", "chosen_loss", "chosen_perplexity",
    ]  # fmt: skip
    assert metrics["loss"]["base"]["value"] == pytest.approx(math.log(2))
    assert metrics["loss"]["tuned"]["value"] < 0.5
    assert metrics["margin"]["difference"]["value"] > 1
    assert metrics["accuracy"]["tuned"]["value"] >= metrics["accuracy"]["base"]["value"]
    assert all(0 <= m["p_value"] <= 1 for m in metrics.values())
    assert done[1].run["comparison"]["examples"][0]["reference"]


def test_the_comparison_is_that_of_the_models_probabilities(done: tuple[RunConfig, TrainResult]):
    config, result = done
    assert result.tokenizer is not None
    rows = rows_of_run(config).test
    pairs = encode_pairs(rows, TextReader(result.tokenizer), config.max_length)
    found = log_probs(result.model, pairs)
    by_hand = []
    for pair in pairs:
        sides = []
        for side in (pair.chosen, pair.rejected):
            with torch.no_grad():
                logits = result.model(torch.tensor([side.input_ids])).logits[0].log_softmax(-1)
            places = range(pair.start, len(side.input_ids))
            sides.append(sum(float(logits[i - 1, side.input_ids[i]]) for i in places))
        by_hand.append(sides[0] - sides[1])
    assert [pair.margin for pair in found] == pytest.approx(by_hand, abs=1e-3)
    (margin,) = [m for m in result.run["comparison"]["metrics"] if m["name"] == "margin"]
    assert margin["tuned"]["value"] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-3)


def test_the_same_run_gives_the_same_adapter(done: tuple[RunConfig, TrainResult]):
    config = done[0]
    before, lines = adapter_hash(config.output), losses_of(config.output)
    again = load_config(None, {**config.model_dump(), "overwrite": True, "evaluate": False})
    train(again)
    assert (adapter_hash(config.output), losses_of(config.output)) == (before, lines)


def test_the_reference_is_the_base_even_under_a_trained_adapter(tmp_path: Path):
    config = make_dpo(tmp_path)
    model, tokenizer = load(config.model)
    attach(model, LoRA(rank=4), name="default")
    for _, params in adapter_places(model, "default"):
        torch.nn.init.normal_(params.B, std=0.5)
    trainer = trainer_on(config, model, tokenizer)
    assert trainer.ref_model is None
    pairs = encode_pairs(rows_of_run(config).train, TextReader(tokenizer), config.max_length)
    active = [pair.chosen for pair in log_probs(model, pairs)]
    with disabled(model):
        base = log_probs(model, pairs)
    found = trainer.train_dataset
    assert found["ref_chosen_logps"] == pytest.approx([p.chosen for p in base], abs=1e-3)
    assert found["ref_rejected_logps"] == pytest.approx([p.rejected for p in base], abs=1e-3)
    assert max(abs(a - p.chosen) for a, p in zip(active, base, strict=True)) > 0.5


def test_dropout_of_the_base_is_off_while_it_trains_and_back_afterwards(tmp_path: Path):
    config = make_dpo(tmp_path)
    model, tokenizer = load(config.model)
    attach(model, LoRA(rank=4), name="default")
    model.model.extra = torch.nn.Dropout(0.3)
    with left_as_it_was(model):
        trainer_on(config, model, tokenizer)
        assert model.model.extra.p == 0
    assert model.model.extra.p == 0.3
    assert "forward" not in vars(model)


# A run that goes wrong.


def test_nothing_is_written_for_bad_data(tmp_path: Path):
    config = make_dpo(tmp_path, max_length=4)
    with pytest.raises(DataError, match=r"the prompt fills all 4 tokens"):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": "bfd"}, "'packing' does not apply to the task 'dpo'"),
        ({"packing": True}, "'packing' does not apply to the task 'dpo'"),
        ({"eight_bits": True}, "'eight_bits' does not apply to the task 'dpo'"),
        ({"cache_trunk": True}, "'cache_trunk' does not apply to the task 'dpo'"),
        ({"prompt": "a", "completion": "b"}, "'completion' does not apply to the task 'dpo'"),
        ({"text": "a"}, "'text' does not apply to the task 'dpo'"),
        ({"format": "alpaca"}, "'format' does not apply to the task 'dpo'"),
        ({"task": "sft", "beta": 0.2}, "'beta' belongs to the tasks dpo, grpo, kto and orpo"),
        ({"task": "dop"}, "Did you mean 'dpo'?"),
        ({"beta": 0}, "'beta' must be a number above 0, not 0"),
    ],
)
def test_a_key_the_task_does_not_know_is_refused_by_name(changes: dict[str, Any], sentence: str):
    check_refused(sentence, **{"task": "dpo", **changes})


def test_the_formula_knows_that_preferences_want_a_lower_rate():
    run = {"model": "m", "data": "d", "output": "o"}
    sft, dpo = (
        learning_rate(load_config(None, {**run, "task": task}), 1024, "llama", 1.0)
        for task in ("sft", "dpo")
    )
    assert dpo.value == pytest.approx(sft.value / 10)
    assert dpo.reason.endswith("* 0.1 (lora, dpo)")


def test_what_the_user_left_open_is_settled_by_the_task_and_stays():
    run = {"model": "m", "data": "d", "output": "o", "task": "dpo"}
    config = load_config(None, run)
    assert (config.beta, config.packing, config.cache_trunk) == (0.1, False, False)
    assert load_config(None, config.model_dump()) == config
    assert load_config(None, {**run, "packing": "auto", "beta": 0.5}).beta == 0.5


# Storages, methods, options.


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_every_kind_of_run_learns(tmp_path: Path, changes: dict[str, Any]):
    train(make_dpo(tmp_path, epochs=4.0, evaluate=False, **changes))
    held = [x["eval_loss"] for x in losses_of(tmp_path / "out") if "eval_loss" in x]
    if changes.get("method") != "prefix":  # the only one of these that begins off the base
        assert held[0] == pytest.approx(math.log(2), abs=1e-6)
    assert held[-1] < held[0] - 0.05


def test_a_reference_that_recomputes_is_the_same_reference(tmp_path: Path):
    kept = train(make_dpo(tmp_path, "kept", activations="keep-all", evaluate=False))
    again = train(make_dpo(tmp_path, "again", activations="layer-inputs", evaluate=False))
    assert kept.run["steps"] == again.run["steps"] == 12
    losses = [[x.get("loss", 0) for x in losses_of(tmp_path / n)] for n in ("kept", "again")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
