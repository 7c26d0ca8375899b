"""The page on models that see: its figures are those measured, its keys those that are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from inlay.train.images import NOT_HERE

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from vision_tables import page  # noqa: E402

PAGE = (ROOT / "docs" / "guides" / "images.md").read_text(encoding="utf-8")


def test_the_tables_are_what_was_measured() -> None:
    assert page(PAGE) == PAGE, "run python docs/vision_tables.py"


def test_every_family_answers_what_no_base_does() -> None:
    measured = json.loads((ROOT / "benchmarks/figures/vision_digits.json").read_text())["cases"]
    families = {case["family"] for case in measured}
    assert len(families) >= 4
    assert len(measured) == 2 * len(families)
    for case in measured:
        assert case["exact_match"]["tuned"]["value"] > 0.9
        assert case["exact_match"]["base"]["value"] < 0.2
        assert case["answers"] == 359


def test_every_key_that_is_refused_stands_on_the_page() -> None:
    for key in NOT_HERE:
        assert f"`{key}`" in PAGE
