"""The small files and models that the documentation's pages read, made when they are needed."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demo_data.arithmetic import generate_problems
from demo_data.reports import Report, generate_reports

LIKED, OTHER = "End of the report.", "Thanks."
"""What a reader likes reports to end in, and what not."""


def make(name: str, folder: Path) -> None:
    """Make one of the files that a page says it is given."""
    MAKERS[name](folder / name)


def prompt(report: Report) -> str:
    return f"Findings: {report.findings}\nImpression:"


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def answers(path: Path, count: int = 60, seed: int = 0) -> None:
    reports = generate_reports(count, seed=seed)
    write_rows(path, ({"prompt": prompt(r), "completion": r.impression} for r in reports))


def pairs(path: Path, count: int = 100, seed: int = 0) -> None:
    write_rows(
        path,
        (
            {
                "prompt": prompt(r),
                "chosen": f"{r.impression} {LIKED}",
                "rejected": f"{r.impression} {OTHER}",
            }
            for r in generate_reports(count, seed=seed)
        ),
    )


def labelled(path: Path, count: int = 100, seed: int = 0) -> None:
    write_rows(
        path,
        (
            {
                "prompt": prompt(r),
                "completion": f"{r.impression} {OTHER if i % 2 else LIKED}",
                "label": i % 2 == 0,
            }
            for i, r in enumerate(generate_reports(count, seed=seed))
        ),
    )


def chats(path: Path) -> None:
    turns = (("user", prompt), ("assistant", lambda r: r.impression))
    write_rows(
        path,
        (
            {"messages": [{"role": role, "content": text(r)} for role, text in turns]}
            for r in generate_reports(20, seed=0)
        ),
    )


def questions(path: Path) -> None:
    problems = generate_problems(40, seed=0)
    write_table(path, [{**asdict(p), "topic": f"topic {i % 12}"} for i, p in enumerate(problems)])


def problems(path: Path) -> None:
    write_rows(path, (asdict(problem) for problem in generate_problems(6, seed=1)))


def urgency(path: Path) -> None:
    words = ("urgent", "routine")
    write_table(
        path,
        [
            {"findings": r.findings, "urgency": words["No acute" in r.impression]}
            for r in generate_reports(60, seed=0)
        ],
    )


def impressions(path: Path) -> None:
    fields = ("findings", "impression")
    reports = generate_reports(80, seed=0)
    write_table(path, [{name: getattr(r, name) for name in fields} for r in reports])


def scans(path: Path) -> None:
    from vision_tiny import make_digits

    rows = make_digits(path.parent, 30)
    if rows != path:
        shutil.copy(rows, path)


def digit(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16), "white").save(path)


def run_file(path: Path) -> None:
    path.write_text(
        "model: pocket\ndata: reports\noutput: run\nbatch_size: 8\ngradient_accumulation: 4\n"
    )


def more(write: Callable[..., None]) -> Callable[[Path], None]:
    """Return what writes a smaller file of the same kind with other rows."""
    return lambda path: write(path, 12, 1)


def vision_model(shared: Path) -> str:
    """Return a tiny model that sees, with random weights, made once."""
    from vision_tiny import make_vision_model

    folder = shared / "qwen2_5_vl"
    return str(folder if folder.is_dir() else make_vision_model(folder, "qwen2_5_vl"))


def encoder(shared: Path) -> str:
    """Return a tiny BERT with random weights, made once."""
    from heads_tiny import make_encoder

    folder = shared / "encoder"
    words = sorted({w for r in generate_reports(100, seed=0) for w in r.findings.split()})
    return str(folder if folder.is_dir() else make_encoder(folder, words=words))


STAND_INS: dict[str, Callable[[Path], str]] = {
    "Qwen/Qwen3-0.6B": lambda shared: "pocket",
    "Qwen/Qwen2.5-VL-3B-Instruct": vision_model,
    "path/to/an/encoder": encoder,
}
"""Models that a page names and a test cannot download, and the ones it uses in their place."""
MAKERS: dict[str, Callable[[Path], None]] = {
    "my_rows.jsonl": answers,
    "more_rows.jsonl": more(answers),
    "pairs.jsonl": pairs,
    "more_pairs.jsonl": more(pairs),
    "labelled.jsonl": labelled,
    "more_labelled.jsonl": more(labelled),
    "more_problems.jsonl": problems,
    "chats.jsonl": chats,
    "questions.csv": questions,
    "reports.csv": urgency,
    "more.csv": urgency,
    "impressions.csv": impressions,
    "scans.jsonl": scans,
    "more.jsonl": scans,
    "digit.png": digit,
    "run.yaml": run_file,
}
"""Files by name, with what writes them."""
