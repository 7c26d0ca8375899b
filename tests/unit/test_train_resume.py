"""`kill -9` at any moment, then the same command with --resume: the same adapter, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).parent / "train_kills.py"
TRIED = {"lora": 6, "prefix": 1, "full": 1, "dpo": 3} | dict.fromkeys(
    ("kto", "orpo", "grpo", "classify", "reward", "embed", "images"), 2
)
"""The methods and tasks, and how many runs of each are killed, each twice."""


def ends(folder: Path, method: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder), f"{method}:{TRIED[method]}"],
        capture_output=True,
        text=True,
        cwd=DRIVER.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)[method]


@pytest.mark.slow
@pytest.mark.parametrize("method", TRIED)
def test_a_killed_run_resumes_to_the_same_adapter(tmp_path: Path, method: str) -> None:
    whole, *killed = ends(tmp_path, method)
    assert len(killed) == TRIED[method]
    for end in killed:
        assert next(iter(end["moments"].values())) == -9, end["moments"]
        assert end["code"] == 0, end["moments"]
        assert end["adapter"] == whole["adapter"], end["moments"]
        assert end["metrics"] == whole["metrics"], end["moments"]
        assert end["left"] == []
    second = [list(end["moments"].values())[1] for end in killed]
    assert method != "lora" or -14 in second
