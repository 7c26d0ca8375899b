"""On the embedded model and real reports: packed training has the losses of padded training."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_data import REPORTS, needs_reports

from inlay.tasks.config import load_config
from inlay.train.output.recorder import read_metrics
from inlay.train.run import train


@pytest.mark.slow
@pytest.mark.real
@needs_reports
def test_packed_losses_on_real_reports_are_the_padded_ones(tmp_path: Path):
    losses: list[list[float]] = []
    for packing in (True, False):
        run = {
            "model": "pocket", "data": str(REPORTS), "output": str(tmp_path / str(packing)),
            "prompt": "Findings: {findings}\nImpression:", "completion": "impression",
            "split_by": "uid", "skip_empty": True, "max_rows": 150, "max_steps": 20,
            "gradient_accumulation": 1, "log_every": 1, "eval_rows": 8, "evaluate": False,
            "dtype": "float32", "packing": packing, "threads": 1,
        }  # fmt: skip
        train(load_config(None, run))
        found = read_metrics(tmp_path / str(packing) / "metrics.jsonl")
        losses.append([float(str(line.get("loss", line.get("eval_loss")))) for line in found])
    assert len(losses[0]) == len(losses[1]) > 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
