"""Every method on the real radiology reports in ../shared: findings -> impression, three seeds.

    python -m benchmarks.results.radiology [--methods lora,full] [--seeds 0,1,2]

Each run is the command itself in a process of its own, on pocket; its run.json is the result.
Rows are split 80/10/10 by uid; base and tuned are compared on the test part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import FIGURES, REPORTS, write

EVERYWHERE = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "embed_tokens", "lm_head",
]  # fmt: skip
"""LoRA on the embedding and the head too: pocket has never read a radiology report."""
WIDE = ["--rank", "64", "--alpha", "64", "--learning-rate", "4e-3", "--targets", *EVERYWHERE]
METHODS: dict[str, list[str]] = {
    "full": ["--method", "full", "--learning-rate", "1e-3"],
    "lora": ["--method", "lora", *WIDE],
    "qlora": ["--method", "lora", "--storage", "nf4", *WIDE],
    "dora": ["--method", "dora"],
    "ia3": ["--method", "ia3"],
    "bottleneck": ["--method", "bottleneck", "--variant", "houlsby", "--size", "64"],
    "prefix": ["--method", "prefix"],
    "lora, defaults": ["--method", "lora"],
}
COMMON = [
    "--model", "pocket", "--data", str(REPORTS),
    "--prompt", "Findings: {findings}\nImpression:", "--completion", "impression",
    "--split-by", "uid", "--skip-empty", "--epochs", "1", "--batch-size", "8",
    "--gradient-accumulation", "1", "--eval-rows", "300", "--generate-rows", "100",
    "--generate-tokens", "40", "--save-every", "1000", "--threads", "1",
]  # fmt: skip
LANES = 2
"""Runs side by side, one thread each: times are of a shared machine."""


def main() -> None:
    """Run the chosen methods and seeds, add them to the result file, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=";".join(METHODS), help="names, separated by ;")
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    runs = earlier_runs()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    wanted = [(name, seed) for seed in seeds for name in given.methods.split(";")]
    with ThreadPoolExecutor(LANES) as lanes:
        for name, seed, found in lanes.map(lambda pair: (*pair, run(*pair)), wanted):
            runs[f"{name}/{seed}"] = {"method": name, "seed": seed} | found
            print(name, seed, found, flush=True)
            write("radiology", {"common": portable(COMMON), "summary": summary(runs), "runs": runs})
    print(table(summary(runs)))


def earlier_runs() -> dict[str, Any]:
    """Return the runs of an earlier call: the work can be done in parts."""
    path = FIGURES / "radiology.json"
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def run(name: str, seed: int) -> dict[str, Any]:
    """Train, measure, and return the figures of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "inlay", "train", *COMMON, *METHODS[name]]
        command += ["--seed", str(seed), "--output", f"{folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        record = json.loads((Path(folder) / "run" / "run.json").read_text())
    metrics = {m["name"]: m for m in record["comparison"]["metrics"]}
    return {
        "base_loss": metrics["loss"]["base"]["value"],
        "loss": metrics["loss"]["tuned"]["value"],
        "loss_interval": [metrics["loss"]["tuned"]["low"], metrics["loss"]["tuned"]["high"]],
        "p_value": metrics["loss"]["p_value"],
        "base_rouge_l": metrics["rouge_l"]["base"]["value"],
        "rouge_l": metrics["rouge_l"]["tuned"]["value"],
        "rouge_l_p_value": metrics["rouge_l"]["p_value"],
        "exact_match": metrics["exact_match"]["tuned"]["value"],
        "trainable": record["trainable"]["count"],
        "trainable_percent": record["trainable"]["percent"],
        "learning_rate": record["learning_rate"]["value"],
        "peak_memory_mib": round(record["peak_memory_bytes"] / 2**20),
        "seconds": round(record["seconds"], 1),
        "adapter_bytes": record["adapter_bytes"],
        "flags": METHODS[name],
    }


def summary(runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return means over seeds with the spread, and ratios to full fine-tuning's loss."""
    names = list(dict.fromkeys(r["method"] for r in runs.values()))
    by_name = {n: [r for r in runs.values() if r["method"] == n] for n in names}
    full = by_name.get("full")
    rows: list[dict[str, Any]] = []
    for name, found in by_name.items():
        losses = [r["loss"] for r in found]
        row: dict[str, Any] = {
            "method": name,
            "seeds": len(found),
            "base_loss": statistics.mean(r["base_loss"] for r in found),
            "loss": statistics.mean(losses),
            "loss_min": min(losses),
            "loss_max": max(losses),
            "rouge_l": statistics.mean(r["rouge_l"] for r in found),
            "base_rouge_l": statistics.mean(r["base_rouge_l"] for r in found),
            "largest_p_value": max(r["p_value"] for r in found),
            "trainable_percent": found[0]["trainable_percent"],
            "peak_memory_mib": max(r["peak_memory_mib"] for r in found),
            "seconds": statistics.median(r["seconds"] for r in found),
        }
        if full:
            row["loss_over_full"] = row["loss"] / statistics.mean(r["loss"] for r in full)
        rows.append(row)
    return rows


def portable(flags: list[str]) -> list[str]:
    """Return the flags without this machine's path."""
    return [f"../shared/data/radiology/{REPORTS.name}" if f == str(REPORTS) else f for f in flags]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the summary as a Markdown table."""
    head = (
        "| method | loss (min-max) | over full | ROUGE-L | p | trained % | peak MiB | seconds |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    lines = [
        f"| {r['method']} | {r['loss']:.3f} ({r['loss_min']:.3f}-{r['loss_max']:.3f}) "
        f"| {r.get('loss_over_full', float('nan')):.3f} | {r['rouge_l']:.3f} "
        f"| {r['largest_p_value']:.1e} | {r['trainable_percent']:.3g} "
        f"| {r['peak_memory_mib']} | {r['seconds']:.0f} |"
        for r in rows
    ]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    main()
