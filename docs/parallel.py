"""Write the table of docs/guides/parallel.md from benchmarks/figures/distributed.json.

python docs/parallel.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "figures" / "distributed.json"
PAGE = ROOT / "docs" / "guides" / "parallel.md"
START, END = "<!-- measured: docs/parallel.py -->", "<!-- end of measured -->"
MIB = 1 << 20


def main() -> None:
    """Write the table between its marks."""
    PAGE.write_text(with_table(PAGE.read_text(), json.loads(RESULT.read_text())))


def with_table(page: str, result: dict[str, Any]) -> str:
    """Return the page with what was measured between its marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{measured(result)}\n{END}{after}"


def measured(result: dict[str, Any]) -> str:
    """Describe the run and the machine, and return the table."""
    shape, m = result["shape"], result["machine"]
    head = (
        "| weights | `parallel` | processes | frozen weights each, MiB | most held, MiB "
        "| planned, MiB | planned / measured | seconds a step | planned | loss from one process |"
    )
    return "\n".join(
        [
            f"A random model of the 0.5B shape with {shape['num_hidden_layers']} layers, "
            f"{result['steps']} steps, {result['threads_each']} thread a process on {m['cores']} "
            f"cores ({m['cpu']}); what is held is the whole process, Python and PyTorch included.",
            "",
            head,
            "|---" * 10 + "|",
            *map(row, result["cases"]),
        ]
    )


def row(case: dict[str, Any]) -> str:
    """Return one case's line."""
    frozen, peak = max(case["frozen_bytes"]), max(case["peak_bytes"])
    return (
        f"| {case['storage']} | {case['parallel']} | {case['processes']} | {frozen / MIB:,.0f} "
        f"| {peak / MIB:,.0f} | {case['planned_bytes'] / MIB:,.0f} "
        f"| {case['planned_over_measured']:.2f} | {case['seconds_a_step']:.2f} "
        f"| {case['planned_seconds_a_step']:.2f} | {case['largest_loss_difference']:.0e} |"
    )


if __name__ == "__main__":
    main()
