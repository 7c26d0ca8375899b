"""The same reward run here and in TRL + peft gives the same loss and margin at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl import RewardConfig, RewardTrainer
from trl_peers import STEPS, own_curve, pairs, peers_curve, run_file

from inlay.model.load.heads import Head
from inlay.train.rows import rows_of_run
from inlay.train.run import train

PAIRS = 8
"""All of them in every batch, so that no order of rows can make a difference."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, on its arguments' names
def test_loss_and_margin_agree_with_trl_and_peft(tmp_path: Path) -> None:
    config = run_file(tmp_path, pairs(PAIRS, "impression"), task="reward", learning_rate=3e-3)
    train(config)
    mine = own_curve(config)
    head, rows = Head("sequence", seed=config.seed), rows_of_run(config).train.rows
    peers = peers_curve(config, RewardTrainer, RewardConfig, rows, head, max_length=None)
    assert len(mine) == len(peers) == STEPS
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.1
    for ours, theirs in zip(mine, peers, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.005, abs=1e-3)
        assert ours["reward_margin"] == pytest.approx(theirs["margin"], rel=0.005, abs=2e-3)
        assert ours["reward_accuracy"] == theirs["accuracy"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
