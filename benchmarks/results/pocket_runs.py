"""Runs of pocket that a benchmark compares: trained once, merged into the base, and reported."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from inlay.cli.main import main as inlay
from inlay.tasks.config import load_config
from inlay.train.run import train

THREADS = 1


def run(folder: Path, name: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Train a run of this name, unless the folder holds it finished; return its run.json."""
    also = {"dtype": "float32", "threads": THREADS, "save_every": 1000, "resume": True}
    return train(load_config(None, {**also, **keys, "output": str(folder / name)})).run


def warm_start(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Train a run named `warm`, merge it into the model `base`; return its run.json."""
    found = run(folder, "warm", keys)
    merged = ["merge", "--adapter", str(folder / "warm"), "--output", str(folder / "base")]
    assert (folder / "base").exists() or inlay([*merged, "--threads", str(THREADS)]) == 0
    return found


def metrics(found: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return some metrics of a run's comparison: base, tuned, their difference and its p."""
    kept = ("base", "tuned", "difference", "p_value", "rows")
    return {
        metric["name"]: {name: metric[name] for name in kept}
        for metric in found["comparison"]["metrics"]
        if metric["name"] in names
    }
