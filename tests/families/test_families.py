"""Some of transformers' classes on tiny models: those of the day, and those that failed once.

`make families` tries all of them, on the release that is installed.
"""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import checks
import family
import pytest

A_DAY = 6
"""Classes that are tried on one day; all of them come round in some months."""
FAILED_ONCE: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "failed_once.json").read_text()
)
"""Class -> the checks that it failed once, which run always."""


def of_the_day() -> list[str]:
    """Return the day's part of the classes: the same everywhere on one date."""
    names = sorted(family.families())
    random.Random("inlay").shuffle(names)
    first = datetime.now(UTC).date().toordinal() * A_DAY
    return [names[(first + i) % len(names)] for i in range(A_DAY)]


def wrong(found: dict[str, Any]) -> dict[str, Any]:
    """Return the checks that came to a fault, with what was found."""
    return {c: f for c, f in found.get("checks", {}).items() if f["result"] == "FAULT"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", of_the_day())
def test_the_class_of_the_day_is_right_or_refused(name: str) -> None:
    found = checks.tried(name, *family.families()[name])
    assert wrong(found) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in FAILED_ONCE if n in family.families()])
def test_what_failed_once_is_right_or_refused(name: str) -> None:
    found = checks.tried(name, *family.families()[name], only=FAILED_ONCE[name])
    assert "checks" in found, found
    assert wrong(found) == {}
