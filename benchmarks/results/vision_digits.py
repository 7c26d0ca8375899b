"""Tiny random vision-language models trained on scikit-learn's digits by `inlay train`.

    python -m benchmarks.results.vision_digits [--families F ...] [--storages S ...]
        [--jobs 1] [--work DIR]

Each family and storage is one command; the held-out share of right answers goes to
figures/vision_digits.json once all that were asked for are done. A run that lies finished in the
work folder is not trained again, and one that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from vision_tiny import FAMILIES, make_digits, make_vision_model

from benchmarks.lib.machine import write

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
    "save_every": 60,
    "resume": True,
    "threads": 1,
}
"""The run of every family; it adapts every linear layer but the output head."""
OWN: dict[str, dict[str, Any]] = {
    "gemma3": {
        "targets": ["language", "vision"],
        "modules_to_save": ["multi_modal_projector"],
        "epochs": 12,
    },
}
"""Keys of one family: Gemma 3's projector is no linear layer, and is trained in full, longer."""


def measured(folder: Path, family: str, storage: str) -> dict[str, Any]:
    """Train a family in a storage, unless the folder holds that run finished; return the result."""
    name = f"{family}-{storage}"
    keys = RUN | OWN.get(family, {})
    keys |= {"model": family, "data": "digits.jsonl", "output": name, "storage": storage}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "inlay", "train", f"{name}.yaml"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    run = json.loads((folder / name / "run.json").read_text())
    metrics = {m["name"]: m for m in run["comparison"]["metrics"]}
    case = {
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
    }
    print(json.dumps(case), flush=True)
    return case


def main() -> None:
    """Train the chosen cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--storages", nargs="+", default=["dense", "nf4"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(given.jobs) as pool:
        folder = given.work or Path(place)
        make_digits(folder)
        for family in given.families:
            if not (folder / family).is_dir():
                make_vision_model(folder / family, family)
        asked = list(product(given.families, given.storages))
        cases = list(pool.map(lambda case: measured(folder, *case), asked))
    print(write("vision_digits", {"run": RUN, "own": OWN, "cases": cases}))


if __name__ == "__main__":
    main()
