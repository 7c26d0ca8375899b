"""The same KTO run here and in TRL + peft gives the same loss, KL and rewards at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from demo_data.reports import generate_reports
from trl import KTOConfig, KTOTrainer
from trl_peers import STEPS, own_curve, peers_curve, run_file, short_prompt

from inlay.train.order import kept_order
from inlay.train.rows import rows_of_run
from inlay.train.run import train

ROWS, BATCH = 32, 4
"""Eight batches, so that ten steps go on into a second epoch."""


def labelled(count: int) -> list[dict[str, Any]]:
    """Return impressions, every fourth one a remark that is undesirable."""
    reports = generate_reports(count, seed=0)
    return [
        {
            "prompt": short_prompt(report),
            "completion": report.impression if i % 4 else f"Report {i} was read.",
            "label": bool(i % 4),
        }
        for i, report in enumerate(reports)
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, on its arguments' names
@pytest.mark.parametrize("method", [{}, {"method": "ia3", "learning_rate": 1e-2}], ids=str)
def test_loss_kl_and_rewards_agree_with_trl_and_peft(
    tmp_path: Path, method: dict[str, Any]
) -> None:
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.8}
    keys = {"task": "kto", "batch_size": BATCH, "beta": 0.2, **weights, **method}
    config = run_file(tmp_path, labelled(ROWS), **keys)
    train(config)
    mine = own_curve(config)
    rows = rows_of_run(config).train.rows
    # TRL goes through its rows as they stand, so that it is given both epochs' as one.
    order = [i for epoch in (0, 1) for i in kept_order([0] * ROWS, BATCH, config.seed, epoch)]
    rows = [rows[i] for i in order[: STEPS * BATCH]]
    peers = peers_curve(config, KTOTrainer, KTOConfig, rows, max_length=None, **weights)
    assert len(mine) == len(peers) == STEPS
    both = [line for line in mine if "reward_undesirable" in line]
    assert both[-1]["reward_desirable"] > both[-1]["reward_undesirable"] + 0.1
    assert len(both) < STEPS  # some batches have one label
    assert max(line["kl"] for line in mine) > 0
    for ours, theirs in zip(mine, peers, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.005, abs=1e-3)
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.01, abs=5e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02, abs=1e-4)
        for name, peer in (("desirable", "chosen"), ("undesirable", "rejected")):
            assert (f"reward_{name}" in ours) == (f"rewards/{peer}" in theirs)
            if f"reward_{name}" in ours:
                assert ours[f"reward_{name}"] == pytest.approx(
                    theirs[f"rewards/{peer}"], rel=0.01, abs=3e-3
                )
