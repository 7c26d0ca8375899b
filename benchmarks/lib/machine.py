"""The machine that a figure is measured on, and the files that figures are written to."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
FIGURES = Path(os.environ.get("INLAY_BENCHMARK_FIGURES", REPOSITORY / "benchmarks" / "figures"))
SHARED = REPOSITORY.parent / "shared"
REPORTS = SHARED / "data" / "radiology" / "reports.csv"
PROBLEMS = SHARED / "data" / "math" / "gsm8k_train.jsonl"
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
"""Threads of every contestant; one contestant works at a time."""
PACKAGES = ("inlay", "torch", "transformers", "trl", "peft", "bitsandbytes")


CLASSES = {"": "no bfloat16 arithmetic", "_avx512bf16": "AVX512-BF16", "_amx": "AMX"}
"""Classes of CPU, by the suffix of their result files."""
STANDS_IN = "ONEDNN_MAX_CPU_ISA"
"""Set to AVX512_CORE_VNNI, with INLAY_NATIVE=avx512, a CPU stands in for one without bfloat16; set
to AVX512_CORE_BF16, with INLAY_NATIVE=avx512_bf16, for one without AMX."""


def class_of_cpu() -> str:
    """Return which of CLASSES this CPU is of: what its products of bfloat16 run on."""
    import torch

    from inlay.kernels.scratch import BELOW_HALVES, WITHOUT_TILES

    level = os.environ.get("INLAY_NATIVE", "").lower()
    if level in BELOW_HALVES:
        return ""
    if torch.cpu._is_amx_tile_supported() and level != WITHOUT_TILES:
        return "_amx"
    return "_avx512bf16" if torch.cpu._is_avx512_bf16_supported() else ""


def machine() -> dict[str, Any]:
    """Describe this machine and the versions on it."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "class": CLASSES[class_of_cpu()],
        **({"stands_in_by": os.environ[STANDS_IN]} if STANDS_IN in os.environ else {}),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """Write one benchmark's result as JSON, with the machine's description."""
    FIGURES.mkdir(exist_ok=True)
    path = FIGURES / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path


def cases_before(name: str, measured_now: Collection[str]) -> list[dict[str, Any]]:
    """Return the cases that an earlier run on this machine measured, and this one does not."""
    path = FIGURES / f"{name}.json"
    before = json.loads(path.read_text()) if path.is_file() else {"cases": []}
    kept = [case for case in before["cases"] if case["case"] not in measured_now]
    if kept and before["machine"] != machine():
        raise SystemExit(
            f"{path} holds {len(kept)} cases of another machine or other versions: measure all "
            "of them here, or give --output another name."
        )
    return kept


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Return the median, the quartiles and the values themselves, to that many digits."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else []
    low, middle, high = quartiles or [*values] * 3
    shown = {"median": middle, "q1": low, "q3": high}
    rounded = {name: significant(value, digits) for name, value in shown.items()}
    return {**rounded, "values": [significant(value, digits) for value in values]}


def significant(value: float, digits: int) -> float:
    """Round to that many significant digits."""
    return float(f"{value:.{digits}g}")
