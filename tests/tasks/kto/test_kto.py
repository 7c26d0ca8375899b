from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
    stages_of,
    trainer_on,
    what_is_left,
)
from trl.trainer import kto_trainer

from inlay.data.text_reader import TextReader
from inlay.errors import DataError
from inlay.memory.devices import this_machine
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach, disabled
from inlay.model.adapters.registry import adapter_places
from inlay.model.load.pretrained import load
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.tasks.kto.compare import labelled_losses
from inlay.tasks.kto.mismatched import mismatched, mismatched_in_batches
from inlay.tasks.kto.rows import encode_labelled
from inlay.train import proposal
from inlay.train.rows import rows_of_run
from inlay.train.run import TrainResult, train

make_kto = partial(make_task, "kto")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, TrainResult]:
    with one_model(kto_trainer):
        config = make_kto(tmp_path_factory.mktemp("kto"), epochs=8.0)
        return config, train(config)


def test_a_run_leaves_what_a_supervised_one_does(done: tuple[RunConfig, TrainResult]):
    config, result = done
    run, page = what_is_left(config, result)
    assert (run["config"]["beta"], run["config"]["desirable_weight"]) == (1.0, "auto")
    assert run["weights"]["desirable"] == 1
    assert run["config"]["packing"] is False
    assert "Reward of desirable answers" in page
    assert "Desirable answer more likely (AUC)" in page


def test_metrics_are_the_tasks_own(done: tuple[RunConfig, TrainResult]):
    lines = losses_of(done[0].output)
    weights = done[1].run["weights"]
    held, steps = ([x for x in lines if name in x] for name in ("eval_loss", "loss"))
    assert held[0]["eval_reward_margin"] == held[0]["eval_kl"] == 0
    assert held[0]["eval_reward_auc"] == 0.5
    assert min(weights.values()) / 2 <= held[0]["eval_loss"] <= max(weights.values()) / 2
    assert held[-1]["eval_loss"] < held[0]["eval_loss"] - 0.1
    assert held[-1]["eval_reward_auc"] > 0.9
    assert held[-1]["eval_reward_desirable"] > held[-1]["eval_reward_undesirable"] + 1
    assert steps[0]["kl"] == 0
    assert steps[-1]["reward_desirable"] > steps[-1]["reward_undesirable"]


def test_base_and_tuned_are_compared_on_held_out_rows(done: tuple[RunConfig, TrainResult]):
    config, result = done
    metrics = {m["name"]: m for m in result.run["comparison"]["metrics"]}
    assert list(metrics)[:7] == [
        "auc", "reward_margin", "loss", "desirable_reward", "undesirable_reward",
        "desirable_loss", "desirable_perplexity",
    ]  # fmt: skip
    rows = rows_of_run(config).test
    good = sum(row["label"] for row in rows.rows)
    assert metrics["auc"]["rows"] == metrics["loss"]["rows"] == len(rows)
    assert metrics["desirable_reward"]["rows"] == metrics["desirable_loss"]["rows"] == good
    assert metrics["reward_margin"]["base"]["value"] == 0
    assert metrics["reward_margin"]["tuned"]["value"] == pytest.approx(
        metrics["desirable_reward"]["tuned"]["value"]
        - metrics["undesirable_reward"]["tuned"]["value"]
    )
    assert metrics["reward_margin"]["difference"]["value"] > 1
    assert metrics["auc"]["tuned"]["value"] > metrics["auc"]["base"]["value"]
    assert metrics["loss"]["difference"]["value"] < 0
    assert all(0 <= m["p_value"] <= 1 for m in metrics.values())
    assert result.run["comparison"]["rows"] == len(rows)


def test_the_comparison_is_that_of_the_models_probabilities(done: tuple[RunConfig, TrainResult]):
    config, result = done
    assert result.tokenizer is not None
    rows = rows_of_run(config).test
    encoded = encode_labelled(rows, TextReader(result.tokenizer), config.max_length)

    def by_hand() -> list[float]:
        found = []
        for row in encoded:
            ids = row.answer.input_ids
            with torch.no_grad():
                logits = result.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(sum(float(logits[i - 1, ids[i]]) for i in range(row.start, len(ids))))
        return found

    tuned = by_hand()
    with disabled(result.model):
        base = by_hand()
    rewards = [t - b for t, b in zip(tuned, base, strict=True)]
    good = [r for r, row in zip(rewards, encoded, strict=True) if row.desirable]
    metrics = {m["name"]: m for m in result.run["comparison"]["metrics"]}
    found = metrics["desirable_reward"]["tuned"]["value"]
    assert found == pytest.approx(config.beta * sum(good) / len(good), abs=1e-3)


def test_the_same_run_gives_the_same_adapter(done: tuple[RunConfig, TrainResult]):
    config = done[0]
    before, lines = adapter_hash(config.output), losses_of(config.output)
    again = load_config(None, {**config.model_dump(), "overwrite": True, "evaluate": False})
    train(again)
    assert (adapter_hash(config.output), losses_of(config.output)) == (before, lines)


def test_the_reference_is_the_base_even_under_a_trained_adapter(tmp_path: Path):
    config = make_kto(tmp_path)
    model, tokenizer = load(config.model)
    attach(model, LoRA(rank=4), name="default")
    for _, params in adapter_places(model, "default"):
        torch.nn.init.normal_(params.B, std=0.5)
    trainer = trainer_on(config, model, tokenizer)
    assert trainer.ref_model is None
    rows = encode_labelled(rows_of_run(config).train, TextReader(tokenizer), config.max_length)
    others = mismatched_in_batches(rows, config.batch_size, config.seed, config.max_length)
    active = labelled_losses(model, rows, others)
    with disabled(model):
        base = labelled_losses(model, rows, others)
    found = trainer.train_dataset
    assert found["ref_logps"] == pytest.approx([-r.nll for r in base.answers], abs=1e-3)
    assert found["ref_KL_logps"] == pytest.approx([-r.nll for r in base.mismatched], abs=1e-3)
    for mine, theirs in ((active.answers, base.answers), (active.mismatched, base.mismatched)):
        assert max(abs(a.nll - b.nll) for a, b in zip(mine, theirs, strict=True)) > 0.5


def test_batches_stay_together_and_their_answers_are_those_of_the_kl(tmp_path: Path):
    config = make_kto(tmp_path, batch_size=4)
    model, tokenizer = load(config.model)
    attach(model, LoRA(rank=4), name="default")
    trainer = trainer_on(config, model, tokenizer)
    sampler = trainer._get_train_sampler()
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        numbers = list(sampler)
        epochs.append([tuple(numbers[i : i + 4]) for i in range(0, len(numbers), 4)])
    whole = len(trainer.train_dataset) // 4
    assert {frozenset(epoch[:whole]) for epoch in epochs} == {frozenset(epochs[0][:whole])}
    assert len({tuple(epoch) for epoch in epochs}) > 1
    for batch in epochs[0][:whole]:
        rows = trainer.train_dataset.select(batch)
        assert sorted(rows["KL_completion_ids"]) == sorted(rows["completion_ids"])


def test_the_plan_holds_both_passes(tmp_path: Path):
    config = make_kto(tmp_path, batch_size=4)
    model, tokenizer = load(config.model)
    attach(model, LoRA(rank=4), name="default")
    trainer = trainer_on(config, model, tokenizer)
    stages = stages_of(config)
    rows = stages.tokens()[0].train
    planned = stages.task.to_plan(rows, this_machine())
    order = list(trainer._get_train_sampler())
    batches = [order[i : i + 4] for i in range(0, len(rows), 4)]
    size = {tuple(b): len(b) * max(len(rows[i].answer.input_ids) for i in b) for b in batches}
    largest = trainer.batch_of(max(size, key=lambda batch: size[batch]))
    for name in ("input_ids", "KL_input_ids", "attention_mask", "KL_attention_mask"):
        assert torch.equal(planned.batch[name], largest[name]), name


def test_no_run_of_single_rows_is_proposed(tmp_path: Path):
    device: Any = SimpleNamespace(kind="cpu")
    found = proposal.candidates(make_kto(tmp_path, batch_size=4), proposal.STORAGES, device)
    assert {size for _, size, _ in found} == {4, 2}


# A run that goes wrong.


@pytest.mark.parametrize(
    ("part", "split", "sentence"),
    [
        ("train", [0.1, 0.0, 0.9], "rows to train on are all desirable, and both are needed"),
        ("test", [0.9, 0.0, 0.1], "rows held out to compare base and tuned on are all desirable"),
    ],
)
def test_a_part_with_one_label_stops_before_anything_is_written(
    tmp_path: Path, part: str, split: list[float], sentence: str
):
    config = make_kto(tmp_path, split=split)
    rows = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    alike = set(getattr(rows_of_run(config), part).lines)
    for line, row in enumerate(rows, start=1):
        row["label"] = line in alike or line % 2 == 0
        row["completion"] = f"{row['completion']} {'left' if row['label'] else 'seen'}"
    Path(config.data).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=rf"labelled\.jsonl: the \d+ {sentence}"):
        train(config)
    assert not Path(config.output).exists()
    if part == "test":
        train(load_config(None, {**config.model_dump(), "evaluate": False, "max_steps": 1}))


def test_nothing_is_written_for_bad_data(tmp_path: Path):
    config = make_kto(tmp_path, max_length=4)
    with pytest.raises(DataError, match=r"the prompt fills all 4 tokens"):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": "bfd"}, "'packing' does not apply to the task 'kto'"),
        ({"eight_bits": True}, "'eight_bits' does not apply to the task 'kto'"),
        ({"cache_trunk": True}, "'cache_trunk' does not apply to the task 'kto'"),
        ({"prompt": "a", "completion": "b"}, "'completion' does not apply to the task 'kto'"),
        ({"text": "a"}, "'text' does not apply to the task 'kto'"),
        ({"format": "alpaca"}, "'format' does not apply to the task 'kto'"),
        ({"task": "dpo", "desirable_weight": 2}, "'desirable_weight' belongs to the task kto"),
        ({"task": "sft", "undesirable_weight": "auto"}, "'undesirable_weight' belongs to the task"),
        ({"beta": 0}, "'beta' must be a number above 0, not 0"),
        ({"desirable_weight": -1.0}, "'desirable_weight' must be 'auto' or a number above 0"),
        ({"batch_size": 1}, "'batch_size' must be at least 2 for the task 'kto': how far"),
    ],
)
def test_a_key_the_task_does_not_know_is_refused_by_name(changes: dict[str, Any], sentence: str):
    check_refused(sentence, **{"task": "kto", **changes})


def test_what_the_user_left_open_is_settled_by_the_task_and_stays():
    run = {"model": "m", "data": "d", "output": "o", "task": "kto"}
    config = load_config(None, run)
    assert (config.beta, config.desirable_weight, config.packing) == (0.1, "auto", False)
    assert load_config(None, config.model_dump()) == config
    assert load_config(None, {**run, "desirable_weight": 2}).desirable_weight == 2


# Storages, methods, options.


@pytest.mark.parametrize("changes", [*KINDS, {"batch_size": 4, "desirable_weight": 2.0}], ids=str)
def test_every_kind_of_run_learns(tmp_path: Path, changes: dict[str, Any]):
    train(make_kto(tmp_path, epochs=4.0, evaluate=False, **changes))
    held = [x for x in losses_of(tmp_path / "out") if "eval_loss" in x]
    if changes.get("method") != "prefix":  # the only one of these that begins off the base
        assert held[0]["eval_reward_margin"] == pytest.approx(0, abs=1e-6)
    assert held[-1]["eval_loss"] < held[0]["eval_loss"] - 0.02
    assert held[-1]["eval_reward_margin"] > held[0]["eval_reward_margin"] + 0.2


def test_held_out_prompts_get_answers_of_other_prompts(tmp_path: Path):
    config = make_kto(tmp_path)
    _, tokenizer = load(config.model)
    rows = encode_labelled(rows_of_run(config).test, TextReader(tokenizer), config.max_length)
    others = mismatched(rows, config.max_length)
    assert len(others) == len(rows)
    assert all(
        other.input_ids != row.answer.input_ids for row, other in zip(rows, others, strict=True)
    )
