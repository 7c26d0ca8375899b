"""The page on several processes: its table is what was measured, and that is within the bounds."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "parallel.py"))
RESULT: dict[str, Any] = json.loads(SCRIPT["RESULT"].read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = RESULT["cases"]


def test_the_table_is_what_was_measured() -> None:
    page = SCRIPT["PAGE"].read_text(encoding="utf-8")
    assert SCRIPT["with_table"](page, RESULT) == page


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['storage']}-{c['parallel']}")
def test_what_was_measured_is_within_what_is_promised(case: dict[str, Any]) -> None:
    one = next(c for c in CASES if c["storage"] == case["storage"] and c["processes"] == 1)
    parts = case["processes"] if case["parallel"] == "fsdp" else 1
    for found in case["frozen_bytes"]:
        assert found == pytest.approx(one["frozen_bytes"][0] / parts, rel=0.02)
    assert abs(case["planned_over_measured"] - 1) <= 0.05
    assert case["largest_loss_difference"] <= 1e-4
