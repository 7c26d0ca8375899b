"""Train short runs at two commits and compare them bit for bit.

    python scripts/compare_losses.py A B   # commits, or folders with src/inlay
    python scripts/compare_losses.py 21e514f main --only 'dpo/*' 'pocket/*'
    python scripts/compare_losses.py 21e514f . --json table.json

Compared are, for every run: the lines of metrics.jsonl (timings left out), the adapter's tensors,
the figures of the comparison in run.json and the planned memory (what the process itself takes
left out). A run that is refused must be refused at both. Texts, such as notes, may differ and
are counted. The speed is printed as B over A: above 1, B is faster. Exit code: 0 where all is
equal, 1 where anything differs.

The results of a commit are kept in `--cache`, so that another comparison with it trains one side.
A ratio of speed is of use only where both sides were trained in one call, on a machine that did
nothing else: give a new folder as `--cache` for it.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from loss_cases import Case, cases, make_inputs

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "inlay-compare-losses"
BATCH = 60
"""Runs to a process, so that one that dies takes few with it."""


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    options.cache.mkdir(parents=True, exist_ok=True)
    chosen = [
        case
        for case in cases(options.full)
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.only)
        and not any(fnmatch.fnmatch(case.name, pattern) for pattern in options.skip)
    ]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    inputs = made_inputs(options.cache)
    before, after = (results(name, chosen, inputs, options) for name in (options.a, options.b))
    rows = [compared(case.name, before[case.name], after[case.name]) for case in chosen]
    print_table(rows, options.verbose)
    if options.json:
        record = {"a": described(options.a), "b": described(options.b), "runs": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row["differs"] for row in rows))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="a commit, or a folder that holds src/inlay")
    parser.add_argument("b", metavar="B", help="the commit or folder to compare with it")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of runs, as 'dpo/*'")
    parser.add_argument("--skip", nargs="+", default=[], help="patterns of runs to leave out")
    parser.add_argument("--full", action="store_true", help="every task x method x storage")
    parser.add_argument("--list", action="store_true", help="list the runs and stop")
    parser.add_argument("--verbose", action="store_true", help="print equal runs too")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"default: {CACHE}")
    return parser.parse_args(argv)


def made_inputs(cache: Path) -> Path:
    """Return the folder of models and data, made if it is not there; named by what made it."""
    made_by = Path(__file__).with_name("loss_cases.py").read_bytes() + library_versions().encode()
    folder = cache / f"inputs-{hashlib.sha256(made_by).hexdigest()[:12]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            with contextlib.redirect_stderr(io.StringIO()):
                make_inputs(Path(temporary))
            Path(temporary).rename(folder)
            Path(temporary).mkdir()
    return folder


def library_versions() -> str:
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "trl", "accelerate")
    return " ".join(f"{name} {version(name)}" for name in names)


def described(name: str) -> str:
    """Return the commit's full hash, or the folder's path."""
    if Path(name, "src", "inlay").is_dir():
        return str(Path(name).resolve())
    found = git("rev-parse", "--verify", f"{name}^{{commit}}")
    return found.decode().strip()


def git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=REPOSITORY, check=True, capture_output=True).stdout


# Training at one commit


def results(
    name: str, chosen: Sequence[Case], inputs: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the result of every run at a commit, from the cache where it is there."""
    full = described(name)
    kept = options.cache / "results" / full if not Path(full).is_dir() else None
    files = {case.name: kept and cache_file(kept, case, inputs) for case in chosen}
    known = {case.name: from_cache(files[case.name]) for case in chosen}
    missing = [case for case in chosen if known[case.name] is None]
    if not missing:
        return known
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(full) / "src" if kept is None else exported(full, Path(temporary))
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            for case, found in zip(
                part, trained(source, part, inputs, Path(temporary)), strict=True
            ):
                known[case.name] = found
                to_cache(files[case.name], found)
            print(f"{name}: {start + len(part)} of {len(missing)} runs", file=sys.stderr)
    return known


def cache_file(kept: Path, case: Case, inputs: Path) -> Path:
    """Return where a run's result is kept: named by what the result depends on."""
    read = [content(case.model(inputs)), content(case.data(inputs))]
    what = json.dumps([case.keys, *read, library_versions(), cpu()], sort_keys=True)
    return kept / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"


@cache
def content(path: Path) -> str:
    """Return a hash of a file, or of a folder's files; nothing for what is built in."""
    files = sorted(path.glob("*")) if path.is_dir() else [path] if path.is_file() else []
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def cpu() -> str:
    """Return the name of the processor: how products round depends on it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    return next((line for line in lines if line.startswith("model name")), platform.machine())


def from_cache(path: Path | None) -> Any:
    return json.loads(path.read_text()) if path is not None and path.is_file() else None


def to_cache(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None and found["code"] in (0, 2):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))


def exported(commit: str, folder: Path) -> Path:
    """Write a commit's sources to a folder; return the folder to import from."""
    archive = io.BytesIO(git("archive", commit, "src"))
    with tarfile.open(fileobj=archive) as file:
        file.extractall(folder / "tree", filter="data")
    return folder / "tree" / "src"


def trained(source: Path, part: Sequence[Case], inputs: Path, folder: Path) -> list[dict[str, Any]]:
    """Train the runs in one process that imports Inlay from `source`; return their results."""
    todo, done = folder / "todo.json", folder / "done.jsonl"
    done.unlink(missing_ok=True)
    todo.write_text(json.dumps([case.run_file(inputs) for case in part]))
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    words = [sys.executable, str(Path(__file__).with_name("loss_worker.py"))]
    subprocess.run([*words, str(source), str(todo), str(done), str(folder)], env=environment)
    lines = done.read_text().splitlines() if done.is_file() else []
    found = [json.loads(line) for line in lines]
    lost = {"code": -1, "said": "the process died", "seconds": 0.0}
    return found + [lost] * (len(part) - len(found))


# Comparing


def compared(name: str, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Return what differs between two results of a run, and B's speed over A's."""
    row: dict[str, Any] = {"name": name, "differs": [], "words": 0}
    row["result"] = "trained" if a["code"] == 0 else "refused" if a["code"] == 2 else "failed"
    if a["code"] != b["code"]:
        row["differs"] = [f"exit code {a['code']} -> {b['code']}: {(b['said'] or a['said'])[:200]}"]
        return row
    if a["code"] != 0:
        row["words"] = int(a["said"] != b["said"])
        if a["code"] != 2:
            row["differs"] = [f"failed at both: {b['said'][:200]}"]
        return row
    for part in ("metrics", "adapter", "comparison", "plan"):
        row["differs"] += [f"{part}: {line}" for line in differences(a[part], b[part])]
    row["words"] = sum(x != y for x, y in zip(a["texts"], b["texts"], strict=False))
    row["words"] += abs(len(a["texts"]) - len(b["texts"]))
    if a["steps_per_second"] and b["steps_per_second"]:
        row["steps_per_second"] = b["steps_per_second"] / a["steps_per_second"]
    row["processor"] = a["processor"] / b["processor"]
    return row


def differences(a: Any, b: Any, place: str = "") -> Iterator[str]:
    """Yield where two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from differences(a.get(key), b.get(key), f"{place}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{place}[{i}]")
    elif a != b and not (a != a and b != b):
        yield f"{place.lstrip('.')} {short(a)} -> {short(b)}"


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def print_table(rows: Sequence[dict[str, Any]], verbose: bool) -> None:
    """Print the runs that differ, and a line for every group."""
    for row in rows:
        if row["differs"]:
            print(f"DIFFERS  {row['name']}")
            shown = row["differs"] if verbose else row["differs"][:4]
            print("".join(f"    {line}\n" for line in shown), end="")
            if rest := len(row["differs"]) - len(shown):
                print(f"    and {rest} more")
        elif verbose:
            print(f"equal    {row['name']} ({row['result']})")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"].split("/")[0], []).append(row)
    titles = ("equal", "differ", "refused", "words", "steps/s B:A", "processor A:B")
    print(f"\n{'runs':<22}" + "".join(f"{title:>15}" for title in titles))
    for name, members in [*groups.items(), ("all", list(rows))]:
        differ = sum(bool(row["differs"]) for row in members)
        refused = sum(row["result"] == "refused" for row in members)
        words = sum(bool(row["words"]) for row in members)
        counts = (len(members) - differ, differ, refused, words)
        speeds = (ratio(members, key) for key in ("steps_per_second", "processor"))
        print(f"{name:<22}" + "".join(f"{value!s:>15}" for value in (*counts, *speeds)))


def ratio(members: Sequence[dict[str, Any]], key: str) -> str:
    found = [row[key] for row in members if key in row]
    return f"{median(found):.2f}" if found else "-"


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
