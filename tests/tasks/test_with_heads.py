"""What holds for every task on a model with a head: the same again, resumed, stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from heads_tiny import make_any
from train_tiny import adapter_hash, broken_at, losses_of

from inlay.errors import TrainingError
from inlay.tasks.classify.trainer import HeadTrainer
from inlay.tasks.embed.run import EmbedTrainer
from inlay.tasks.reward.run import RewardLoop
from inlay.train.output import checkpoints
from inlay.train.run import train

TASKS: list[tuple[type[Any], dict[str, Any]]] = [
    (HeadTrainer, {"task": "classify"}),
    (HeadTrainer, {"task": "classify", "kind": "tokens", "base": "causal"}),
    (RewardLoop, {"task": "reward"}),
    (EmbedTrainer, {"task": "embed"}),
]
every_task = pytest.mark.parametrize(("trainer", "keys"), TASKS, ids=lambda x: str(x)[-40:])


@every_task
def test_a_run_gives_the_same_again_and_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: type[Any], keys: dict[str, Any]
):
    keys = {**keys, "log_every": 3, "evaluate": False, "max_steps": 8}
    for output in ("a", "b"):
        train(make_any(tmp_path, output, **keys))
    broken_at(monkeypatch, trainer, 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(make_any(tmp_path, "c", resume=True, **keys))
    monkeypatch.undo()
    train(make_any(tmp_path, "c", resume=True, **keys))
    for output in ("b", "c"):
        assert adapter_hash(tmp_path / output) == adapter_hash(tmp_path / "a")
        assert losses_of(tmp_path / output) == losses_of(tmp_path / "a")


@every_task
def test_a_loss_that_is_not_a_number_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: type[Any], keys: dict[str, Any]
):
    config = make_any(tmp_path, "out", resume=True, **keys)
    broken_at(monkeypatch, trainer, 7, float("nan"))
    with pytest.raises(TrainingError, match="the loss became nan at step 7"):
        train(config)
    last = checkpoints.latest(tmp_path / "out" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-6"
    assert not (tmp_path / "out" / "adapter").exists()
