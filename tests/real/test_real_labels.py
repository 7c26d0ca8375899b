"""A real encoder, from the command: normal or not, and findings that find their impression."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from real_data import REPORTS, encoder_folder, needs_encoder, needs_reports

from inlay.cli.main import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    needs_reports,
    needs_encoder,
]


def write_rows(path: Path) -> Path:
    """Write the reports that have findings and an impression, each normal or not."""
    with REPORTS.open(newline="") as file:
        found = [
            r for r in csv.DictReader(file) if r["findings"].strip() and r["impression"].strip()
        ]
    lines = [
        {
            "uid": row["uid"],
            "findings": row["findings"],
            "impression": row["impression"],
            "label": "normal" if row["Problems"] == "normal" else "other",
        }
        for row in found
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trained(folder: Path, task: str, *words: str) -> dict[str, Any]:
    """Return what a run of the command says of itself."""
    data = write_rows(folder / "reports.jsonl")
    line = ["train", "--task", task, "--model", str(encoder_folder()), "--data", str(data)]
    line += ["--split-by", "uid", "--output", str(folder / "run"), "--layers", "3-5", "--rank", "8"]
    line += ["--max-length", "96", "--gradient-accumulation", "1", "--threads", "1"]
    line += ["--split", "0.87", "0.02", "0.11", *words]
    assert main(line) == 0
    return json.loads((folder / "run" / "run.json").read_text())


def test_reports_are_told_normal_from_other(tmp_path: Path) -> None:
    run = trained(
        tmp_path, "classify", "--text", "findings", "--batch-size", "16", "--max-steps", "60"
    )
    metrics = {m["name"]: m for m in run["comparison"]["baseline"]["metrics"]}
    for name in ("accuracy", "macro_f1"):
        assert metrics[name]["difference"]["low"] > 0.05
        assert metrics[name]["p_value"] < 0.001
    assert metrics["accuracy"]["tuned"]["value"] > 0.8
    assert run["rows"]["test"] > 200


def test_findings_find_their_impression(tmp_path: Path) -> None:
    run = trained(
        tmp_path, "embed", "--anchor", "findings", "--positive", "impression",
        "--batch-size", "32", "--max-steps", "12",
    )  # fmt: skip
    metrics = {m["name"]: m for m in run["comparison"]["metrics"]}
    for name in ("recall_at_10", "mrr"):
        assert metrics[name]["difference"]["low"] > 0
        assert metrics[name]["p_value"] < 0.01
