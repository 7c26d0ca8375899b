"""The same ORPO run here and in TRL + peft gives the same loss and odds at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl_peers import STEPS, own_curve, pairs, peers_curve, run_file

from inlay.tasks.orpo.trainer import ORPOConfig, ORPOTrainer
from inlay.train.rows import rows_of_run
from inlay.train.run import train

PAIRS = 6
"""All of them in every batch, so that no order of rows can make a difference."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, on its arguments' names
@pytest.mark.parametrize("method", [{}, {"method": "dora"}], ids=str)
def test_loss_and_odds_agree_with_trl_and_peft(tmp_path: Path, method: dict[str, Any]) -> None:
    config = run_file(tmp_path, pairs(PAIRS, "impression"), task="orpo", beta=0.2, **method)
    train(config)
    mine = own_curve(config)
    peers = peers_curve(
        config,
        ORPOTrainer,
        ORPOConfig,
        rows_of_run(config).train.rows,
        remove_unused_columns=False,
    )
    assert len(mine) == len(peers) == STEPS
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.05
    for ours, theirs in zip(mine, peers, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.005)
        assert ours["log_odds"] == pytest.approx(theirs["log_odds_chosen"], rel=0.005, abs=2e-3)
        assert ours["accuracy"] == theirs["rewards/accuracies"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
