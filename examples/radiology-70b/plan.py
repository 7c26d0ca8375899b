"""Write what `inlay plan` says of the run on several machines into plan.json and README.md.

python examples/radiology-70b/plan.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- plan.py -->", "<!-- end of plan.py -->"
TWO = ["--gpus", "2", "--batch-size", "4", "--gradient-accumulation", "4"]
MACHINES: dict[str, list[str]] = {
    "A100, 80 GB": ["--device", "a100-80"],
    "H100, 80 GB": ["--device", "h100"],
    "H200, 141 GB": ["--device", "h200"],
    "40 GB of an H100": [
        "--device", "h100", "--memory", "40GB", "--head-storage", "nf4",
        "--embedding-storage", "host", "--batch-size", "2", "--gradient-accumulation", "8",
    ],
    "40 GB of an H100, streamed": ["--device", "h100", "--memory", "40GB", "--stream", "host"],
    "12 GB of an RTX 4090, streamed": [
        "--device", "rtx4090", "--memory", "12GB", "--stream", "host", "--batch-size", "4",
        "--gradient-accumulation", "4",
    ],
    "2 x RTX 4090, 24 GB, divided": ["--device", "rtx4090", *TWO, "--parallel", "fsdp"],
    "2 x RTX 4090, 24 GB, streamed": [
        "--device", "rtx4090", *TWO, "--parallel", "ddp", "--stream", "host",
    ],
}  # fmt: skip
"""Where the run file is planned, and what is said beside it."""


def main() -> None:
    """Plan every machine and write both files."""
    found = {name: planned(flags) for name, flags in MACHINES.items()}
    (HERE / "plan.json").write_text(json.dumps(found, indent=1) + "\n")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{table(found)}\n{END}{after}")


def planned(flags: list[str]) -> dict[str, Any]:
    """Return what the command says, as JSON, and how it was called."""
    words = [sys.executable, "-m", "inlay", "plan", "run.yaml", "--model", "config.json", *flags]
    done = subprocess.run([*words, "--json"], cwd=HERE, check=True, stdout=subprocess.PIPE)
    return {"flags": flags, **json.loads(done.stdout)}


def table(found: dict[str, Any]) -> str:
    """Return the plans as a Markdown table."""
    head = "| machine | fits | memory | activations | a step | 10,000 reports, 3 epochs |"
    rows = [head, "|---|---|---|---|---|---|"]
    for name, plan in found.items():
        best = min(plan["options"], key=lambda option: option["total"])
        if plan["chosen"]:
            best = next(o for o in plan["options"] if o["policy"] == plan["chosen"])
        fits = "yes" if plan["chosen"] else "no"
        cells = [
            name, fits, f"{best['total'] / 1e9:.1f} of {plan['limit'] / 1e9:.1f} GB",
            best["policy"], f"{best['seconds']:.1f} s", f"{plan['run_seconds'] / 3600:.1f} h",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
