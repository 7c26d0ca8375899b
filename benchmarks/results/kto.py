"""KTO on pocket and the real radiology reports in ../shared: right against wrong impressions.

    python -m benchmarks.results.kto [--seeds 3] [--work FOLDER]

A short supervised run on some reports first, merged into the base, since a model that has read no
report tells no impression from another; then KTO from that base, once a seed. A row's answer is
its report's own impression, which is desirable, or that of another report of about the same
length, which is not: half each. The learning rate is the one with the highest AUC on rows of
their own; the held-out rows are seen by the final runs alone. A run that lies finished in the
work folder is not trained again.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import REPORTS, write
from benchmarks.results.pocket_runs import THREADS, metrics, run, warm_start

PARTS = {"warm": 1000, "labelled": 600, "choosing": 250, "held_out": 300}
"""Numbers of reports: supervised start, labelled training, learning-rate choice, measurement."""
PROMPT = "Findings: {findings}\nImpression:"
LENGTHS = (3, 6, 10, 20)
"""Upper limits of the length classes of impressions, in words."""
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
WARM: dict[str, Any] = {
    "model": "pocket", "split": [1.0, 0.0, 0.0], "epochs": 1, "rank": 32, "learning_rate": 4e-3,
    "batch_size": 8, "gradient_accumulation": 1, "evaluate": False,
}  # fmt: skip
KTO: dict[str, Any] = {
    "task": "kto", "epochs": 2, "rank": 16, "batch_size": 8, "gradient_accumulation": 2,
    "eval_rows": 300, "generate_rows": 50, "generate_tokens": 40, "log_every": 5,
}  # fmt: skip
METRICS = (
    "auc", "reward_margin", "loss", "desirable_reward", "undesirable_reward", "desirable_loss",
    "rouge_l",
)  # fmt: skip


def main() -> None:
    """Train; print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.work or Path(name)
        folder.mkdir(exist_ok=True)
        rows = write_rows(folder)
        warm = {**WARM, "data": str(folder / "warm.jsonl")}
        seconds = round(warm_start(folder, warm)["seconds"])
        tried = [judged(folder, f"tried-{rate}", rate, "choosing", 0) for rate in LEARNING_RATES]
        rate = max(tried, key=lambda found: found["auc"]["tuned"]["value"])["learning_rate"]
        runs = [
            judged(folder, f"seed-{seed}", rate, "held_out", seed) for seed in range(given.seeds)
        ]
    result = {
        "rows": rows,
        "warm_start_seconds": seconds,
        "tried": tried,
        "learning_rate": rate,
        "runs": runs,
        "keys": KTO,
        "threads": THREADS,
    }
    print(write("kto", result))


def write_rows(folder: Path) -> dict[str, dict[str, int]]:
    """Write the rows of every part, each findings in one part only; return the counts of labels."""
    reports = read_reports()
    drawn = random.Random(0)
    drawn.shuffle(reports)
    counts: dict[str, dict[str, int]] = {}
    for name, size in PARTS.items():
        part, reports = reports[:size], reports[size:]
        assert len(part) == size, f"{REPORTS} has too few reports for {PARTS}"
        rows = supervised(part) if name == "warm" else labelled(part, drawn)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        good = sum(row.get("label", True) for row in rows)
        counts[name] = {"desirable": good, "undesirable": size - good}
    return counts


def read_reports() -> list[dict[str, str]]:
    """Return the reports with findings and an impression, without repeated findings."""
    with REPORTS.open(newline="", encoding="utf-8") as file:
        rows = [{k: (v or "").strip() for k, v in row.items()} for row in csv.DictReader(file)]
    usable = [row for row in rows if row["findings"] and row["impression"]]
    return list({row["findings"]: row for row in usable}.values())


def supervised(reports: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the reports as prompts with their own impressions."""
    return [
        {"prompt": PROMPT.format(**report), "completion": f" {report['impression']}"}
        for report in reports
    ]


def labelled(reports: list[dict[str, str]], drawn: random.Random) -> list[dict[str, Any]]:
    """Return labelled rows: every second report's impression is its own, the others' are not."""
    rows = supervised(reports)
    for number, row in enumerate(rows):
        own = reports[number]["impression"]
        row["label"] = number % 2 == 0
        if not row["label"]:
            others = [r["impression"] for r in reports if alike(r["impression"], own)]
            row["completion"] = f" {drawn.choice(others)}" if others else row["completion"]
            row["label"] = not others
    return rows


def alike(other: str, own: str) -> bool:
    """Say whether two impressions differ and are in the same length class."""
    return other.lower() != own.lower() and length_class(other) == length_class(own)


def length_class(text: str) -> int:
    """Return the class of a text's length in words."""
    return sum(len(text.split()) > limit for limit in LENGTHS)


def judged(folder: Path, name: str, rate: float, held_out: str, seed: int) -> dict[str, Any]:
    """Train on labelled answers from the merged model; return how well the models separate them."""
    files = {"data": "labelled.jsonl", "eval_data": f"{held_out}.jsonl", "model": "base"}
    placed = {key: str(folder / file) for key, file in files.items()}
    found = run(folder, name, {**KTO, **placed, "learning_rate": rate, "seed": seed})
    result = {
        "learning_rate": rate,
        "seed": seed,
        "measured_on": held_out,
        "steps": found["steps"],
        "seconds": round(found["seconds"]),
        **metrics(found, METRICS),
    }
    print(result, flush=True)
    return result


if __name__ == "__main__":
    main()
