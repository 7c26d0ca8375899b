"""The scripts of `benchmarks/` run from end to end, on a tiny shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def run(script: str, results: Path) -> dict[str, Any]:
    environment = {**os.environ, "INLAY_BENCHMARK_RESULTS": str(results)}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--smoke", "--output", "smoke"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((results / "smoke.json").read_text())


@pytest.mark.slow
def test_speed_compares_every_contestant_on_the_same_losses(tmp_path: Path) -> None:
    found = run("speed.py", tmp_path)
    assert [case["storage"] for case in found["cases"]] == ["bf16", "nf4"]
    for case in found["cases"]:
        count = {"bf16": 6, "nf4": 4}[case["storage"]]
        assert len(case["contestants"]) + len(case["skipped"]) == count
        for contestant in case["contestants"].values():
            assert contestant["losses"][-1] < contestant["losses"][0]
            assert contestant["peak_above_weights_bytes"] > 0
        exact = [r for r in case["ratios"] if r["of"] == "inlay"]
        assert len(exact) >= 2
        assert all(r["largest_loss_difference"] < 1e-3 for r in exact), exact


@pytest.mark.slow
def test_real_data_gives_both_sides_the_same_tokens_and_nearly_the_same_loss(
    tmp_path: Path,
) -> None:
    [case] = run("real_data.py", tmp_path)["cases"]
    [sides] = [run["sides"] for run in case["runs"]]
    assert sides["inlay"]["tokens"] == sides["TRL + peft"]["tokens"]
    assert abs(case["held_out_loss_difference"]) < 0.01


@pytest.mark.slow
def test_growth_measures_every_series(tmp_path: Path) -> None:
    found = run("growth.py", tmp_path)
    for series in found["series"].values():
        assert len(series["seconds"]) == len(series["memory_bytes"]) == len(series["points"])
    assert found["adapters"]["held_bytes"][-1] > found["adapters"]["held_bytes"][0]
