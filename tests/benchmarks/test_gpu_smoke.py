"""The GPU measurements run end to end on a CPU, with tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.slow
def test_every_contestant_is_measured_or_says_why_not(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = run("--smoke", "--alternations", "1", "--steps", "2", "--output", str(output))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(output.read_text())
    assert found["machine"]["versions"]["torch"]
    for case in found["cases"].values():
        assert sorted({*case["contestants"], *case["skipped"]}) == sorted(
            case["contestants_wanted"]
        )
        for name, reason in case["skipped"].items():
            assert reason.startswith(("not installed", "not available in this version")), name
        for contestant in case["contestants"].values():
            assert contestant["tokens_per_second"]["median"] > 0
            assert len(contestant["losses"]) == 4
    for case in ("smoke bf16", "smoke nf4"):
        ours, peer = (c["losses"] for c in found["cases"][case]["contestants"].values())
        assert ours == pytest.approx(peer, rel=1e-3)
    assert found["cases"]["smoke bf16"]["skipped"].keys() >= {"unsloth"}


def test_a_machine_without_a_gpu_is_told_so() -> None:
    done = run("--cases", "8B nf4")
    assert done.returncode == 1
    assert "There is no GPU here" in done.stderr


def test_a_misspelt_case_is_told_what_there_is() -> None:
    done = run("--cases", "9B")
    assert done.returncode == 1
    assert "no case begins with '9B'" in done.stderr
