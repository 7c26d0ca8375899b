"""`kill -9` at any moment, then the same command with --resume: the same adapter, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).parents[1] / "support" / "train_kills.py"
TRIED = {"lora": 5} | dict.fromkeys(
    (
        "prefix", "p-tuning", "full", "dpo", "kto", "orpo", "grpo", "classify", "reward", "embed",
        "images", "images-dpo",
    ), 1,
)  # fmt: skip
"""The methods and tasks, and how many runs of each are killed, each twice."""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """How the runs of every method and task ended, by its name."""
    words = [sys.executable, str(DRIVER), str(tmp_path_factory.mktemp("kills"))]
    words += [f"{method}:{kills}" for method, kills in TRIED.items()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=DRIVER.parent, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("method", TRIED)
def test_a_killed_run_resumes_to_the_same_adapter(
    ends: dict[str, list[dict[str, Any]]], method: str
) -> None:
    whole, *killed = ends[method]
    assert len(killed) == TRIED[method]
    for end in killed:
        assert next(iter(end["moments"].values())) == -9, end["moments"]
        assert end["code"] == 0, end["moments"]
        assert end["adapter"] == whole["adapter"], end["moments"]
        assert end["metrics"] == whole["metrics"], end["moments"]
        assert end["left"] == []
    second = [list(end["moments"].values())[1] for end in killed]
    assert method != "lora" or -14 in second
