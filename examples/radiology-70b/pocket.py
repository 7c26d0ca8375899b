"""Run the same file on the embedded model and real reports; write pocket.json and README.md.

python examples/radiology-70b/pocket.py REPORTS.csv [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- pocket.py -->", "<!-- end of pocket.py -->"
SHOWN = {
    "loss": "loss, nats a token",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
}


def main() -> None:
    """Train, and write what the run found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path)
    parser.add_argument("--output", type=Path, help="keep the run's folder here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = trained(given.reports, given.output or Path(folder) / "run")
    found = {
        "rows": run["rows"],
        "trainable": run["trainable"],
        "seconds": run["seconds"],
        "peak_memory_bytes": run["peak_memory_bytes"],
        "machine": run["machine"],
        "metrics": run["comparison"]["metrics"],
    }
    (HERE / "pocket.json").write_text(json.dumps(found, indent=1) + "\n")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{text(found)}\n{END}{after}")


def trained(reports: Path, output: Path) -> dict[str, Any]:
    """Run the command and return its run.json."""
    words = [sys.executable, "-m", "inlay", "train", str(HERE / "run.yaml")]
    words += ["--model", "pocket", "--data", str(reports), "--output", str(output)]
    subprocess.run(words, check=True)
    return json.loads((output / "run.json").read_text())


def text(found: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    rows, share = found["rows"], found["trainable"]
    lines = [
        "```",
        "inlay train run.yaml --model pocket --data reports.csv --output runs/pocket",
        "```",
        "",
        f"The run took {found['seconds'] / 60:.0f} minutes on a shared two-core CPU, on the "
        f"{sum(rows.values()):,} usable ones of 3,351 real reports of Indiana University, "
        f"{rows['train']:,} of them to train on. It trains {share['count']:,} parameters, "
        f"{share['percent']:.2g}% of the model. Base and tuned on the same held-out reports, with "
        "95% intervals and a paired permutation test, from [pocket.json](pocket.json):",
        "",
        "| | base | tuned | p |",
        "|---|---|---|---|",
    ]
    for metric in found["metrics"]:
        if metric["name"] in SHOWN:
            sides = [interval(metric[side]) for side in ("base", "tuned")]
            cells = [SHOWN[metric["name"]], *sides, f"{metric['p_value']:.2g}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(side: dict[str, float | None]) -> str:
    """Return a value with its interval, if it has one."""
    if side["low"] is None:
        return f"{side['value']:.3f}"
    return f"{side['value']:.3f} ({side['low']:.3f}-{side['high']:.3f})"


if __name__ == "__main__":
    main()
