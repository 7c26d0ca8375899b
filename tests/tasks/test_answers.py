"""Runs on answers that go wrong or are broken off: what holds of every task."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_tiny import adapter_hash, broken_at, losses_of, make_task, silence

from inlay.errors import TrainingError
from inlay.tasks.dpo.trainer import PreferenceTrainer
from inlay.tasks.grpo.trainer import RewardTrainer
from inlay.tasks.kto.trainer import LabelledTrainer
from inlay.tasks.orpo.trainer import OddsTrainer
from inlay.train.output import checkpoints
from inlay.train.run import train

TRAINERS = {
    "dpo": PreferenceTrainer,
    "kto": LabelledTrainer,
    "orpo": OddsTrainer,
    "grpo": RewardTrainer,
}
every_task = pytest.mark.parametrize("task", TRAINERS)


@every_task
def test_a_loss_that_is_not_a_number_stops_the_run(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_task(task, tmp_path, resume=True)
    broken_at(monkeypatch, TRAINERS[task], 7, float("nan"))
    with pytest.raises(TrainingError, match="the loss became nan at step 7"):
        train(config)
    last = checkpoints.latest(tmp_path / "out" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-6"
    assert not (tmp_path / "out" / "adapter").exists()
    monkeypatch.undo()
    assert train(config).run["finished"]


@pytest.mark.parametrize(("task", "stopped_at"), [*((task, 6) for task in TRAINERS), ("grpo", 24)])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
):
    keys = {"log_every": 3, "beta": 0.05 if task == "grpo" else 1.0}
    config = make_task(task, tmp_path, resume=True, **keys)
    broken_at(monkeypatch, TRAINERS[task], stopped_at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config)
    train(make_task(task, tmp_path, "whole", **keys))
    assert adapter_hash(config.output) == adapter_hash(tmp_path / "whole")
    assert losses_of(config.output) == losses_of(tmp_path / "whole")


@every_task
def test_an_adapter_without_gradient_stops_the_run(task: str, tmp_path: Path):
    config = make_task(task, tmp_path, targets=["v_proj"])
    silence(config.model, layer=1)
    with pytest.raises(TrainingError, match=r"no gradient reaches .*layers\.1\.self_attn\.v_proj"):
        train(config)
    assert not (tmp_path / "out" / "adapter").exists()
