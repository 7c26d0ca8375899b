from __future__ import annotations

import subprocess
import sys
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
    stages_of,
    what_is_left,
)

from inlay.data.text_reader import TextReader
from inlay.memory.devices import this_machine
from inlay.model.adapters.attach import disabled
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.tasks.dpo.pairs import encode_pairs
from inlay.tasks.orpo.compare import odds_ratios
from inlay.train.rows import rows_of_run
from inlay.train.run import TrainResult, train

make_orpo = partial(make_task, "orpo")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, TrainResult]:
    config = make_orpo(tmp_path_factory.mktemp("orpo"), epochs=6.0)
    return config, train(config)


def test_a_run_leaves_what_a_supervised_one_does(done: tuple[RunConfig, TrainResult]):
    config, result = done
    run, page = what_is_left(config, result)
    assert run["steps"] == 36
    assert "Preferred answer more likely" in page


def test_metrics_are_the_tasks_own(done: tuple[RunConfig, TrainResult]):
    lines = losses_of(done[0].output)
    held, steps = ([x for x in lines if name in x] for name in ("eval_loss", "loss"))
    assert held[-1]["eval_loss"] < held[0]["eval_loss"] - 0.1
    assert held[-1]["eval_accuracy"] == 1
    assert held[-1]["eval_log_odds"] > held[0]["eval_log_odds"] + 0.2
    assert steps[-1]["accuracy"] > 0.8
    assert steps[-1]["log_odds"] > 0.2


def test_base_and_tuned_are_compared_on_held_out_pairs(done: tuple[RunConfig, TrainResult]):
    metrics = {m["name"]: m for m in done[1].run["comparison"]["metrics"]}
    assert list(metrics)[:5] == [
        "accuracy", "margin", "loss", "chosen_loss", "chosen_perplexity",
    ]  # fmt: skip
    assert metrics["loss"]["difference"]["value"] < -0.1
    assert metrics["margin"]["difference"]["value"] > 0.2
    assert metrics["accuracy"]["tuned"]["value"] >= metrics["accuracy"]["base"]["value"]
    assert all(0 <= m["p_value"] <= 1 for m in metrics.values())


def test_the_comparison_is_that_of_the_models_probabilities(done: tuple[RunConfig, TrainResult]):
    config, result = done
    assert result.tokenizer is not None
    pairs = encode_pairs(rows_of_run(config).test, TextReader(result.tokenizer), config.max_length)

    def by_hand() -> tuple[list[float], list[float]]:
        margins, losses = [], []
        for pair in pairs:
            means, whole = [], 0.0
            for side in (pair.chosen, pair.rejected):
                ids = torch.tensor([side.input_ids])
                with torch.no_grad():
                    logits = result.model(ids).logits[0, :-1].log_softmax(-1)
                each = logits.gather(1, ids[0, 1:, None])[:, 0]
                means.append(each[pair.start - 1 :].mean())
                whole = whole or -each.mean()
            margins.append(float(means[0] - means[1]))
            odds = [torch.log(m.exp() / (1 - m.exp())) for m in means]
            ratio = torch.nn.functional.logsigmoid(odds[0] - odds[1])
            losses.append(float(whole - config.beta * ratio))
        return margins, losses

    metrics = {m["name"]: m for m in result.run["comparison"]["metrics"]}
    margins, losses = by_hand()
    assert metrics["margin"]["tuned"]["value"] == pytest.approx(sum(margins) / len(margins), 1e-3)
    assert metrics["loss"]["tuned"]["value"] == pytest.approx(sum(losses) / len(losses), 1e-3)
    with disabled(result.model):
        _, losses = by_hand()
        found = odds_ratios(result.model, pairs, 4, config.beta)
    assert found.losses == pytest.approx(losses, 1e-3)
    assert metrics["loss"]["base"]["value"] == pytest.approx(sum(losses) / len(losses), 1e-3)


def test_the_same_run_gives_the_same_adapter(done: tuple[RunConfig, TrainResult]):
    config = done[0]
    before, lines = adapter_hash(config.output), losses_of(config.output)
    again = load_config(None, {**config.model_dump(), "overwrite": True, "evaluate": False})
    train(again)
    assert (adapter_hash(config.output), losses_of(config.output)) == (before, lines)


@pytest.mark.slow
def test_importing_the_task_says_nothing_of_experiments():
    line = "import warnings; warnings.simplefilter('error'); import inlay.tasks.orpo.run"
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", line],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_plan_counts_the_preferred_rows_prompts(tmp_path: Path):
    stages = stages_of(make_orpo(tmp_path))
    found = stages.task.to_plan(stages.tokens()[0].train, this_machine()).batch
    chosen, rejected = (part for part in found["labels"].chunk(2))
    ids = found["input_ids"].chunk(2)
    masks = found["attention_mask"].chunk(2)
    assert torch.equal(chosen[masks[0] == 1], ids[0][masks[0] == 1])
    assert (rejected[:, 0] == -100).all()


# A run that goes wrong.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": "bfd"}, "'packing' does not apply to the task 'orpo'"),
        ({"eight_bits": True}, "'eight_bits' does not apply to the task 'orpo'"),
        ({"cache_trunk": True}, "'cache_trunk' does not apply to the task 'orpo'"),
        ({"desirable_weight": 2}, "'desirable_weight' belongs to the task kto, not to 'orpo'"),
        ({"beta": 0}, "'beta' must be a number above 0, not 0"),
    ],
)
def test_a_key_the_task_does_not_know_is_refused_by_name(changes: dict[str, Any], sentence: str):
    check_refused(sentence, **{"task": "orpo", **changes})


# Storages, methods, options.


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_every_kind_of_run_learns(tmp_path: Path, changes: dict[str, Any]):
    train(make_orpo(tmp_path, epochs=4.0, evaluate=False, **changes))
    held = [x for x in losses_of(tmp_path / "out") if "eval_loss" in x]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"] - 0.1
    assert held[-1]["eval_log_odds"] > held[0]["eval_log_odds"] + 0.05
