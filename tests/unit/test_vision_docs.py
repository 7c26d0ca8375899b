"""The page on models that see: its figures are those measured, its keys those that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

from inlay.train.vision import NOT_HERE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")


def test_the_table_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/vision_digits.json").read_text())["cases"]
    rows = re.findall(r"^\| (\w+) \| ([\d.]+)% \| ([\d.]+)% \| ([\d,]+) of ([\d,]+)", PAGE, re.M)
    by_case = {(case["family"], case["storage"]): case for case in measured}
    families = {family for family, _ in by_case}
    assert {row[0] for row in rows} == families
    assert len(families) >= 4
    for family, lora, qlora, trained, total in rows:
        for storage, shown in (("dense", lora), ("nf4", qlora)):
            case = by_case[family, storage]
            assert f"{case['exact_match']['tuned']['value']:.1%}" == f"{shown}%"
            assert case["exact_match"]["tuned"]["value"] > 0.9
            assert case["answers"] == 359
            assert f"{case['trained_parameters']:,}" == trained
            assert f"{case['parameters']:,}" == total


def test_every_key_that_is_refused_stands_on_the_page() -> None:
    for key in NOT_HERE:
        assert f"`{key}`" in PAGE
