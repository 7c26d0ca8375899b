"""The scripts of `benchmarks/` run from end to end, on tiny shapes, those for a GPU on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from forked_workers import Forked

from benchmarks.gpu import steps as gpu_steps
from benchmarks.lib import machine, turns
from benchmarks.lib.shapes import layer_products, shape_config
from benchmarks.lib.turns import Worker, WorkerError
from benchmarks.memory import growth
from benchmarks.speed import real_data, steps

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that figures are written to, with forked workers."""
    monkeypatch.setattr(turns, "launched", Forked)
    monkeypatch.setattr(machine, "FIGURES", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def run(main: Callable[[list[str]], None], figures: Path) -> dict[str, Any]:
    main(["--smoke", "--output", "smoke"])
    return json.loads((figures / "smoke.json").read_text())


@pytest.mark.slow
def test_speed_compares_every_contestant_on_the_same_losses(figures: Path) -> None:
    found = run(steps.main, figures)
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
    figures: Path,
) -> None:
    [case] = run(real_data.main, figures)["cases"]
    [sides] = [run["sides"] for run in case["runs"]]
    assert sides["inlay"]["tokens"] == sides["TRL + peft"]["tokens"]
    assert abs(case["held_out_loss_difference"]) < 0.01


@pytest.mark.slow
def test_growth_measures_every_series(figures: Path) -> None:
    found = run(growth.main, figures)
    for series in found["series"].values():
        assert len(series["seconds"]) == len(series["memory_bytes"]) == len(series["points"])
    assert found["adapters"]["held_bytes"][-1] > found["adapters"]["held_bytes"][0]


@pytest.mark.slow
def test_a_worker_is_a_process_of_its_own_that_answers_and_says_what_it_raised() -> None:
    products = [tuple(product) for product in layer_products(shape_config("tiny"))]
    with Worker("lib.gemm_worker", {"products": products, "tokens": 4}) as worker:
        rates = worker.ask(measure=True)
        assert min(rates["float32"], rates["bfloat16"]) > 0
    with pytest.raises(WorkerError, match="KeyError: 'products'"):
        Worker("lib.gemm_worker", {"tokens": 4})


# Those for a GPU


@pytest.mark.slow
def test_every_contestant_is_measured_or_says_why_not(figures: Path) -> None:
    output = figures / "gpu.json"
    gpu_steps.main(["--smoke", "--alternations", "1", "--steps", "2", "--output", str(output)])
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
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.steps", "--cases", "8B nf4"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    assert "There is no GPU here" in done.stderr


def test_a_misspelt_case_is_told_what_there_is() -> None:
    with pytest.raises(SystemExit, match="no case begins with '9B'") as caught:
        gpu_steps.main(["--cases", "9B"])
    assert isinstance(caught.value.code, str)  # which the interpreter writes to stderr, exit code 1
