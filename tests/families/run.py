"""Try every class of transformers' mappings and write what came of it.

    python tests/families/run.py                 every class, into results/transformers-X.json
    python tests/families/run.py CAUSAL_LM       one mapping; a model type or a class does, too

The classes run in another process, which is started again behind one that dies or hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 120
"""The most processor time that one class may take."""
BEGUN = "begun"
SAYS = ('{"begun"', '{"found"')
"""How a line of the worker's begins that is for us."""


def main(argv: list[str] | None = None) -> int:
    """Run the classes asked for; return 1 where one has a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="*", help="mappings, model types or classes; default: all")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(argv)
    if given.worker:
        work(given.which)
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    file = given.results / f"transformers-{version('transformers')}.json"
    found = json.loads(file.read_text())["classes"] if file.is_file() and given.which else {}
    for more in everything(chosen(given.which)):
        found |= more
        write(file, found)
    print(json.dumps(counts(found), indent=1))
    return int(bool(faults(found)))


def chosen(which: list[str]) -> list[str]:
    """Return the classes that these words name."""
    import family

    families = family.families()
    return [n for n, names in families.items() if not which or {n, *names} & set(which)]


def everything(names: list[str]) -> Iterator[dict[str, Any]]:
    """Try classes one after another in processes that may die; yield what each came to."""
    found: dict[str, Any] = {}
    while left := [n for n in names if n not in found]:
        begun = None
        command = [sys.executable, "-u", __file__, "--worker", *left]
        with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                said = json.loads(line) if line.startswith(SAYS) else {}
                begun = said.get(BEGUN, begun)
                if "found" in said:
                    found[begun], begun = said["found"], None
                    yield dict([*found.items()][-1:])
        if begun is not None:
            why = f"the process ended with {worker.returncode}: it crashed, or took {SECONDS} s"
            found[begun] = {"checks": {"all": {"result": "FAULT", "why": why}}}
            yield {begun: found[begun]}
        elif worker.returncode:
            raise SystemExit(f"the worker ended with {worker.returncode} between two classes")


def work(names: list[str]) -> None:
    """Try classes, one line of JSON before and after each."""
    import logging

    import checks
    import family
    import transformers

    logging.getLogger("torch").setLevel(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    families = family.families()
    for name in names:
        print(json.dumps({BEGUN: name}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(20 * SECONDS)
        begun = time.process_time()
        model_type, mapping = families[name]
        found = checks.tried(name, model_type, mapping)
        found["seconds"] = round(time.process_time() - begun, 2)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"found": found}), flush=True)
        wrong = [c for c, f in found.get("checks", {}).items() if f["result"] == "FAULT"]
        print(name, found.get("not built", ", ".join(wrong) or "ok"), file=sys.stderr, flush=True)


def faults(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the checks that came to a fault, by class."""
    return {
        name: {c: f["why"] for c, f in one["checks"].items() if f["result"] == "FAULT"}
        for name, one in found.items()
        if any(f["result"] == "FAULT" for f in one.get("checks", {}).values())
    }


def counts(found: dict[str, Any]) -> dict[str, Any]:
    """Return how many classes came to what."""
    words = Counter(
        "not built" if "not built" in one else "fault" if name in faults(found) else "judged"
        for name, one in found.items()
    )
    return {**words, "by check": dict(Counter(c for f in faults(found).values() for c in f))}


def write(file: Path, found: dict[str, Any]) -> None:
    """Write the results, in the order of their names."""
    file.parent.mkdir(exist_ok=True)
    releases = {name: version(name) for name in ("transformers", "torch", "peft")}
    lines = [f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in sorted(found.items())]
    classes = ",\n".join(lines)
    file.write_text(f'{{"releases": {json.dumps(releases)},\n "classes": {{\n{classes}\n }}}}\n')


if __name__ == "__main__":
    sys.exit(main())
