"""Write the demo rows that ship with Inlay, or print others.

python examples/demo_data/ship.py                              # src/inlay/data/demo/*.jsonl.gz
python examples/demo_data/ship.py reports 500 --seed 1         # 500 rows, to stdout
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from demo_data.arithmetic import generate_problems  # noqa: E402
from demo_data.reports import generate_reports  # noqa: E402

SHIPPED = ROOT / "src" / "inlay" / "data" / "demo"
COUNT, SEED = 2400, 0


def report_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return reports with the prompt that asks for an impression."""
    return [
        {
            "uid": report.uid,
            "findings": report.findings,
            "impression": report.impression,
            "label": report.label,
            "prompt": f"Findings: {report.findings}\nImpression:",
            "completion": report.impression,
        }
        for report in generate_reports(count, seed)
    ]


def problem_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return problems with the prompt that asks for an answer."""
    return [
        {
            "uid": problem.uid,
            "question": problem.question,
            "answer": problem.answer,
            "prompt": problem.prompt,
            "completion": problem.answer,
        }
        for problem in generate_problems(count, seed)
    ]


ROWS: dict[str, Callable[[int, int], list[dict[str, str]]]] = {
    "reports": report_rows,
    "arithmetic": problem_rows,
}


def json_lines(name: str, count: int = COUNT, seed: int = SEED) -> str:
    """Return rows as JSON, one a line."""
    return "".join(json.dumps(row) + "\n" for row in ROWS[name](count, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("name", nargs="?", choices=ROWS)
    parser.add_argument("count", nargs="?", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    if options.name:
        sys.stdout.write(json_lines(options.name, options.count, options.seed))
        return
    SHIPPED.mkdir(exist_ok=True)
    for name in ROWS:
        packed = gzip.compress(json_lines(name).encode(), mtime=0)
        (SHIPPED / f"{name}.jsonl.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
