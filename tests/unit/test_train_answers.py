"""Runs on preferences and labels that go wrong or are broken off: what holds of every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_tiny import adapter_hash, broken_at, losses_of, make_run

from inlay.errors import TrainingError
from inlay.model.load import load
from inlay.train import checkpoints
from inlay.train.config import RunConfig
from inlay.train.kto_trainer import LabelledTrainer
from inlay.train.orpo_trainer import OddsTrainer
from inlay.train.preference_trainer import PreferenceTrainer
from inlay.train.run import train

TRAINERS = {"dpo": PreferenceTrainer, "kto": LabelledTrainer, "orpo": OddsTrainer}
pytestmark = pytest.mark.parametrize("task", TRAINERS)


def make(task: str, folder: Path, output: str = "out", **changes: Any) -> RunConfig:
    keys = {"task": task, "beta": 1.0, "learning_rate": 3e-2, "split": [0.6, 0.2, 0.2]}
    return make_run(folder, output, **{**keys, **changes})


def test_a_loss_that_is_not_a_number_stops_the_run(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make(task, tmp_path, resume=True)
    broken_at(monkeypatch, TRAINERS[task], 7, float("nan"))
    with pytest.raises(TrainingError, match="the loss became nan at step 7"):
        train(config)
    last = checkpoints.latest(tmp_path / "out" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-6"
    assert not (tmp_path / "out" / "adapter").exists()
    monkeypatch.undo()
    assert train(config).run["finished"]


def test_an_interrupted_run_resumes_to_the_same_bytes(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make(task, tmp_path, resume=True, log_every=3)
    broken_at(monkeypatch, TRAINERS[task], 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config)
    train(make(task, tmp_path, "whole", log_every=3))
    assert adapter_hash(config.output) == adapter_hash(tmp_path / "whole")
    assert losses_of(config.output) == losses_of(tmp_path / "whole")


def test_an_adapter_without_gradient_stops_the_run(task: str, tmp_path: Path):
    config = make(task, tmp_path, targets=["v_proj"])
    model, tokenizer = load(config.model)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.save_pretrained(config.model)
    tokenizer.save_pretrained(config.model)
    with pytest.raises(TrainingError, match=r"no gradient reaches .*layers\.1\.self_attn\.v_proj"):
        train(config)
    assert not (tmp_path / "out" / "adapter").exists()
