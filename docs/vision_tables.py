"""Write the tables of docs/guides/images.md from benchmarks/figures.

    python docs/vision_tables.py

A table stands between its mark and the next empty line; one whose measurement is not there is
"not yet measured".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "figures"
PAGE = ROOT / "docs" / "guides" / "images.md"
MIB = 2**20


def main() -> None:
    """Write the page with every table anew."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page(text: str) -> str:
    """Return the page with the tables that the results give."""
    for name, table in TABLES.items():
        mark = f"<!-- {name}.json: docs/vision_tables.py -->"
        path = RESULTS / f"{name}.json"
        found = table(json.loads(path.read_text())) if path.is_file() else "Not yet measured."
        text, count = re.subn(f"{mark}\n(.+\n)*", f"{mark}\n{found}\n", text)
        assert count == 1, mark
    return text


def digits(found: dict[str, Any]) -> str:
    """Return the share of right answers of each family, by storage."""
    cases = {(case["family"], case["storage"]): case for case in found["cases"]}
    rows = [
        f"| {family} | {right(dense)} | {right(cases[family, 'nf4'])} "
        f"| {dense['trained_parameters']:,} of {dense['parameters']:,} |"
        for (family, storage), dense in cases.items()
        if storage == "dense"
    ]
    return "\n".join(["| family | LoRA | QLoRA (nf4) | trained |", "|---|---|---|---|", *rows])


def right(case: dict[str, Any]) -> str:
    """Return the share of held-out answers that are right."""
    return f"{case['exact_match']['tuned']['value']:.1%}"


def cache(found: dict[str, Any]) -> str:
    """Return what an epoch takes with the tower's output read, and with the pixels seen."""
    rows = [
        f"| {what} | {value['median']:.2f} ({value['q1']:.2f}-{value['q3']:.2f}) |"
        for what, value in (
            ("seconds an epoch, pixels seen", found["epoch_seconds"]["seen"]),
            ("seconds an epoch, features read", found["epoch_seconds"]["read"]),
            ("**seen over read**", found["seen_over_read"]),
            ("seen over seen, the machine's noise", found["seen_over_seen"]),
        )
    ]
    difference = f"| largest difference of a step's loss | {found['largest_loss_difference']:.1e} |"
    return "\n".join(["| | median (quartiles) |", "|---|---|", *rows, difference])


def plans(found: dict[str, Any]) -> str:
    """Return planned against measured memory."""
    head = "| family | storage | dtype | adapted | policy | planned MiB | measured MiB | error |"
    rows = [
        f"| {r['family']} | {r['storage']} | {r['dtype']} | {r['targets']} | {r['policy']} "
        f"| {r['planned']['total'] / MIB:,.0f} | {r['measured'] / MIB:,.0f} | {r['error']:+.1%} |"
        for r in found["rows"]
    ]
    return "\n".join([head, "|---" * 8 + "|", *rows])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "vision_digits": digits,
    "vision_cache": cache,
    "plan_images": plans,
}
"""The results that tables are made of."""


if __name__ == "__main__":
    main()
