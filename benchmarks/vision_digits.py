"""What tiny random models that see images learn of scikit-learn's digits, by `inlay train`.

Each family and storage is one command; the held-out share of right answers goes to
results/vision_digits.json, beside the cases of families not asked for.
Usage: vision_digits.py [--families F ...] [--storages S ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "unit"))

from machine import RESULTS, write  # noqa: E402
from vision_tiny import FAMILIES, make_digits, make_vision_model  # noqa: E402

RUN: dict[str, Any] = {
    "targets": ["language", "vision", "projector"],
    "rank": 16,
    "alpha": 32,
    "epochs": 8,
    "batch_size": 32,
    "gradient_accumulation": 1,
    "learning_rate": 4e-3,
    "scheduler": "cosine",
    "split": [0.8, 0.0, 0.2],
    "eval_rows": 400,
    "generate_rows": 400,
    "generate_tokens": 2,
    "save_every": 1000,
    "threads": 1,
}
"""The run of every family; what it adapts is every linear layer but the output head."""
OWN: dict[str, dict[str, Any]] = {
    "gemma3": {
        "targets": ["language", "vision"],
        "modules_to_save": ["multi_modal_projector"],
        "epochs": 12,
    },
}
"""What a family needs beside: Gemma 3's projector is no linear layer, trains whole, and longer."""


def measured(folder: Path, family: str, storage: str) -> dict[str, Any]:
    name = f"{family}-{storage}"
    keys = RUN | OWN.get(family, {})
    keys |= {"model": family, "data": "digits.jsonl", "output": name, "storage": storage}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(keys))
    started = time.monotonic()
    command = [sys.executable, "-m", "inlay", "train", f"{name}.yaml"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    run = json.loads((folder / name / "run.json").read_text())
    metrics = {m["name"]: m for m in run["comparison"]["metrics"]}
    return {
        "family": family,
        "storage": storage,
        "rows": run["rows"],
        "steps": run["steps"],
        "trained_parameters": run["trainable"]["count"],
        "parameters": run["trainable"]["total"],
        "answers": run["comparison"]["generated_rows"],
        "exact_match": {who: metrics["exact_match"][who] for who in ("base", "tuned")},
        "loss": {who: metrics["loss"][who] for who in ("base", "tuned")},
        "train_seconds": run["seconds"],
        "command_seconds": time.monotonic() - started,
    }


def earlier() -> list[dict[str, Any]]:
    """Return the cases that were measured before, to be kept beside other families'."""
    path = RESULTS / "vision_digits.json"
    return json.loads(path.read_text())["cases"] if path.is_file() else []


def same(case: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(case[key] == other[key] for key in ("family", "storage"))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--families", nargs="+", default=list(FAMILIES))
    words.add_argument("--storages", nargs="+", default=["dense", "nf4"])
    asked = words.parse_args()
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_digits(folder)
        for family in asked.families:
            make_vision_model(folder / family, family)
            for storage in asked.storages:
                cases.append(measured(folder, family, storage))
                print(json.dumps(cases[-1]), flush=True)
                kept = [case for case in earlier() if not same(case, cases[-1])]
                write("vision_digits", {"run": RUN, "own": OWN, "cases": [*kept, cases[-1]]})


if __name__ == "__main__":
    main()
