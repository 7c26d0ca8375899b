"""Run HF PEFT's own tests with `inlay.peft` in HF PEFT's place, and count.

    python tests/peers/run_peft_tests.py --source PATH [--ref TAG] [--implementation peft]

PATH is a checkout of HF PEFT, or a git directory of it (of which `--ref` is read). Its test files
are copied into a temporary folder and are not part of this repository. The names that a user
imports (`NAMES`) are Inlay's; everything else, configurations too, stays HF PEFT's. What is not
run, and why, is in peft_deselected.json; the counts go to peft_results.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FILES = ("__init__.py", "conftest.py", "testing_common.py", "testing_utils.py")
SUITES = ("test_custom_models.py",)
NAMES = (
    "PeftModel",
    "get_base_model_state_dict",
    "set_base_model_state_dict",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
)
METHODS = frozenset({"LoraConfig", "IA3Config", "LNTuningConfig"})
"""The configurations of these suites whose method Inlay has."""
OPTIONS = frozenset(json.loads((HERE / "peft_deselected.json").read_text())["options"])
"""The options that Inlay does not have."""


def main() -> int:
    """Run the suites, write the counts, and return pytest's exit status."""
    arguments = parsed()
    rules = json.loads((HERE / "peft_deselected.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        copied(arguments.source, arguments.ref, Path(folder))
        if arguments.implementation == "inlay":
            swap()
        report = Counts(rules, arguments.keep_going)
        files = [str(Path(folder) / "tests" / suite) for suite in SUITES]
        quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb", arguments.tb]
        chosen = ["-k", arguments.only] if arguments.only else []
        status = pytest.main(
            [*files, "--rootdir", folder, "-c", "/dev/null", *quiet, *chosen], plugins=[report]
        )
    if arguments.output:
        found = report.summary(arguments, version_of(arguments.source, arguments.ref))
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    return int(status)


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="HF PEFT, checked out or bare")
    parser.add_argument("--ref", default="HEAD", help="which commit of it")
    parser.add_argument("--implementation", choices=("inlay", "peft"), default="inlay")
    parser.add_argument("--output", type=Path, help="where to write the counts")
    parser.add_argument("--only", help="pytest's -k")
    parser.add_argument("--tb", default="line", help="pytest's --tb")
    parser.add_argument("--keep-going", action="store_true", help="run what is deselected by name")
    return parser.parse_args()


def copied(source: Path, ref: str, folder: Path) -> None:
    """Copy the test files, and stand in for what they import and do not use here."""
    (folder / "tests").mkdir()
    for name in (*FILES, *SUITES):
        found = git(source, "show", f"{ref}:tests/{name}")
        (folder / "tests" / name).write_text(found)
    diffusers: Any = types.ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules.setdefault("diffusers", diffusers)


def git(source: Path, *words: str) -> str:
    """Return what git says of the source."""
    command = ["git", "-C", str(source), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def version_of(source: Path, ref: str) -> str:
    """Return the commit that the tests are of."""
    return git(source, "rev-parse", ref).strip()


def swap() -> None:
    """Put Inlay's names where the tests import them from."""
    import peft

    import inlay.peft

    for name in NAMES:
        setattr(peft, name, getattr(inlay.peft, name))
        if hasattr(peft.utils, name):
            setattr(peft.utils, name, getattr(inlay.peft, name))


class Counts:
    """Chooses what to run, and counts what came of it."""

    def __init__(self, rules: dict[str, Any], keep_going: bool) -> None:
        self.rules, self.keep_going = rules, keep_going
        self.left_out: Counter[str] = Counter()
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what Inlay does not have, with the reason."""
        kept: list[pytest.Item] = []
        for item in items:
            reason = self.reason(item)
            if reason is None:
                kept.append(item)
            else:
                self.left_out[reason] += 1
        items[:] = kept

    def reason(self, item: pytest.Item) -> str | None:
        """Return why a test is left out, or None when it runs."""
        params = getattr(getattr(item, "callspec", None), "params", {})
        texts = [text for value in params.values() for text in words(value)]
        for text in texts:
            if text.endswith("Config") and text not in METHODS:
                return f"method: {text}"
        for kind, entries in (("option", "options"), ("layer", "models")):
            for word, why in self.rules[entries].items():
                if word in texts:
                    return f"{kind}: {why}"
        name = item.nodeid.split("::", 1)[1]
        for group, entry in () if self.keep_going else self.rules["tests"].items():
            if any(name == n or name.split("[")[0] == n for n in entry):
                return f"test: {group}"
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test."""
        name = report.nodeid.split("::", 1)[1]
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name] = report.outcome
            if report.failed:
                self.failures[name] = same_every_time(str(report.longrepr).splitlines()[-1])[:300]

    def summary(self, arguments: argparse.Namespace, commit: str) -> dict[str, Any]:
        """Return the counts as JSON values."""
        counts = Counter(self.outcomes.values())
        ran = counts["passed"] + counts["failed"]
        return {
            "suites": list(SUITES),
            "tests_of": f"huggingface/peft {commit}",
            "implementation": arguments.implementation,
            "selected": sum(counts.values()),
            "passed": counts["passed"],
            "failed": counts["failed"],
            "skipped_by_the_tests_themselves": counts["skipped"],
            "passed_of_those_run": round(counts["passed"] / max(ran, 1), 4),
            "left_out": dict(self.left_out.most_common()),
            "failures": self.failures,
        }


def same_every_time(line: str) -> str:
    """Return a line without addresses and temporary folders."""
    return re.sub(r"0x[0-9a-f]+", "0x…", re.sub(r"/tmp/[^\s,'\"]+", "/tmp/…", line))


def words(value: Any) -> list[str]:
    """Return the words of one parameter: a class's name, a model's, the options that are set."""
    if isinstance(value, type):
        return [value.__name__]
    if isinstance(value, dict):
        here = {k: v for k, v in value.items() if v not in (None, False, {}, [])}
        return [*here, *(f"{k}={v}" for k, v in here.items() if isinstance(v, str))]
    if hasattr(value, "peft_type"):
        return [
            type(value).__name__,
            *words({k: v for k, v in vars(value).items() if k in OPTIONS}),
        ]
    return [value] if isinstance(value, str) else []


if __name__ == "__main__":
    sys.exit(main())
