"""Run HF PEFT's or TRL's own tests with `inlay.peft` in HF PEFT's place, and count.

    python tests/peers/run_peft_tests.py --source PATH --suite test_custom_models
    python tests/peers/run_peft_tests.py --source PATH --suite test_sft_trainer --of trl

PATH is a checkout of the project, or a git directory of it (of which `--ref` is read). Its test
files are copied into a temporary folder and are not part of this repository. HF PEFT's tests get
Inlay's names where they import them from `peft`; TRL's run inside
`inlay.peft.take_over()`, those that say "peft" or "lora". Everything else stays the project's own.
What the tests fetch is stood in for (stand_ins.py). `--implementation peft` is the same run on
HF PEFT itself. What is not run, and why, is in peft_deselected.json; `--record` puts the counts
into peers_results.json.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import stand_ins

HERE = Path(__file__).parent
RESULTS = HERE / "peers_results.json"
RULES = json.loads((HERE / "peft_deselected.json").read_text())
SHARED = {
    "peft": ("__init__.py", "conftest.py", "testing_common.py", "testing_utils.py"),
    "trl": ("__init__.py", "conftest.py", "testing_utils.py", "testing_constants.py"),
}
METHODS = frozenset({
    "LoraConfig", "IA3Config", "LNTuningConfig", "PrefixTuningConfig", "PromptTuningConfig",
    "PromptEncoderConfig",
})  # fmt: skip
"""The configurations of these suites whose method Inlay has."""
OPTIONS = frozenset(option.partition("=")[0] for option in RULES["options"])
"""The options that Inlay does not have."""
ONLINE = '''

from contextlib import nullcontext


def hub_online_once(model_id):
    """Stay offline: every model is stood in for."""
    return nullcontext()
'''


def main() -> int:
    """Run one suite, write its counts, and return pytest's exit status."""
    arguments = parsed()
    with tempfile.TemporaryDirectory() as folder:
        stand_ins.build(Path(folder) / "home")
        stand_ins.use_rows()
        copied(arguments, Path(folder))
        if arguments.implementation == "inlay":
            (swap if arguments.of == "peft" else take_over)()
        report = Counts(arguments)
        file = str(Path(folder) / "tests" / f"{arguments.suite}.py")
        quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb", arguments.tb]
        chosen = ["-k", arguments.only] if arguments.only else []
        status = pytest.main(
            [file, "--rootdir", folder, "-c", "/dev/null", *quiet, *chosen], plugins=[report]
        )
    found = report.summary()
    print(json.dumps({k: v for k, v in found.items() if k != "failures"}, indent=1))
    if arguments.record:
        record(arguments, found)
    return int(status)


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="the project, or its git folder")
    parser.add_argument("--of", choices=("peft", "trl"), default="peft", help="whose tests")
    parser.add_argument("--suite", default="test_custom_models", help="a test file of it")
    parser.add_argument("--ref", default="HEAD", help="which commit of it")
    parser.add_argument("--implementation", choices=("inlay", "peft"), default="inlay")
    parser.add_argument("--sample", type=int, default=1, help="run every so many-th test only")
    parser.add_argument("--record", action="store_true", help=f"put the counts in {RESULTS.name}")
    parser.add_argument("--only", help="pytest's -k")
    parser.add_argument("--tb", default="line", help="pytest's --tb")
    parser.add_argument("--keep-going", action="store_true", help="run what is deselected by name")
    return parser.parse_args()


def copied(arguments: argparse.Namespace, folder: Path) -> None:
    """Copy the test files, and stand in for what they import and do not use here."""
    (folder / "tests").mkdir()
    for name in (*SHARED[arguments.of], f"{arguments.suite}.py"):
        found = git(arguments.source, "show", f"{arguments.ref}:tests/{name}")
        online = ONLINE if name == "testing_utils.py" and arguments.of == "peft" else ""
        (folder / "tests" / name).write_text(found + online)
        if arguments.of == "trl":
            lend(found)
    diffusers: Any = types.ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    diffusers.__version__ = "0"
    sys.modules.setdefault("diffusers", diffusers)


def lend(test_file: str) -> None:
    """Let a test file of another TRL be read: a test that calls what this one lacks is skipped."""
    for node in ast.walk(ast.parse(test_file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "trl":
            module = importlib.import_module(node.module or "")
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    reason = f"this TRL has no {name}"
                    absent = (lambda: False) if name.startswith("is_") else skipping(reason)
                    setattr(module, name, absent)


def skipping(reason: str) -> Any:
    """Return a function that skips the test that calls it."""
    return lambda *_, **__: pytest.skip(reason)


def git(source: Path, *words: str) -> str:
    """Return what git says of the source."""
    command = ["git", "-C", str(source), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def swap() -> None:
    """Put Inlay's names where HF PEFT's tests import them from."""
    import peft

    import inlay.peft

    for name in set(inlay.peft.__all__) & set(dir(peft)):
        setattr(peft, name, getattr(inlay.peft, name))
        if hasattr(peft.utils, name):
            setattr(peft.utils, name, getattr(inlay.peft, name))


def take_over() -> None:
    """Do what a script does that wants Inlay under TRL."""
    import inlay.peft

    inlay.peft.take_over()


def record(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Put one run's counts beside the others."""
    with RESULTS.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several suites may run at once
        file.seek(0)
        results = json.loads(file.read() or "{}")
        entry = results.setdefault(f"{arguments.of}/{arguments.suite}", {})
        entry[arguments.implementation] = found
        file.truncate(0)
        file.write(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


class Counts:
    """Chooses what to run, and counts what came of it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.left_out: Counter[str] = Counter()
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.selected = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what Inlay does not have, with the reason; of the rest take every so many."""
        kept: list[pytest.Item] = []
        for item in items:
            reason = self.reason(item)
            if reason is None:
                kept.append(item)
            else:
                self.left_out[reason] += 1
        self.selected = len(kept)
        items[:] = kept[:: self.arguments.sample]

    def reason(self, item: pytest.Item) -> str | None:
        """Return why a test is left out, or None when it runs."""
        if self.arguments.of == "trl" and not about_peft(item):
            return "test: it has no adapter"
        params = getattr(getattr(item, "callspec", None), "params", {})
        texts = [text for value in params.values() for text in words(value)]
        texts += configurations(item.name)
        for text in texts:
            if text.endswith("Config") and text not in METHODS:
                return f"method: {text}"
        for kind, entries in (("option", "options"), ("layer", "models")):
            for word, why in RULES[entries].items():
                if word in texts:
                    return f"{kind}: {why}"
        if not any(text in METHODS for text in texts):
            reason = in_source(item)
            if reason is not None:
                return reason
        name = item.nodeid.split("::", 1)[1]
        for group, entry in () if self.arguments.keep_going else RULES["tests"].items():
            if any(fnmatch(name.split("[")[0], n) or name == n for n in entry):
                return f"test: {group}"
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test."""
        name = report.nodeid.split("::", 1)[1]
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name] = report.outcome
            if report.failed:
                lines = str(report.longrepr).strip().splitlines() or ["?"]
                self.failures[name] = same_every_time(lines[-1])[:300]

    def summary(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        counts = Counter(self.outcomes.values())
        ran = counts["passed"] + counts["failed"]
        where = {"peft": "huggingface/peft", "trl": "huggingface/trl"}[self.arguments.of]
        commit = git(self.arguments.source, "rev-parse", self.arguments.ref).strip()
        return {
            "tests_of": f"{where} {commit}",
            "versions": versions(),
            "collected": self.selected + self.left_out.total(),
            "selected": self.selected,
            "run": sum(counts.values()),
            "passed": counts["passed"],
            "failed": counts["failed"],
            "skipped_by_the_tests_themselves": counts["skipped"],
            "passed_of_those_run": round(counts["passed"] / max(ran, 1), 4),
            "left_out": dict(self.left_out.most_common()),
            "failures": self.failures,
        }


def in_source(item: pytest.Item) -> str | None:
    """Return which method or option that Inlay does not have a test's own code asks for."""
    import peft

    source = inspect.getsource(getattr(item, "function"))  # noqa: B009
    for name in re.findall(r"\b(\w+Config)\(", source):
        if name not in METHODS and hasattr(peft, name):
            return f"method: {name}"
    for words_of_it, why in RULES["source"].items():
        if re.search(words_of_it, f"{item.nodeid}\n{source}", re.I):
            return f"option: {why}"
    return None


def about_peft(item: pytest.Item) -> bool:
    """Say whether a test of TRL has an adapter in it."""
    return re.search("peft|lora", inspect.getsource(getattr(item, "function")), re.I) is not None  # noqa: B009


def configurations(name: str) -> list[str]:
    """Return the configurations that are only in a test's name, as `parameterized` writes them."""
    found = re.search(r"_\d+_(\w+?)_(\w+)$", name)
    pair = found.groups() if found else ()
    known = {"Lora", "LoHa", "LoKr", "AdaLora", "OFT", "BOFT", "IA3", "VeRA", "Vera", "HRA"}
    return [f"{word}Config" for word in pair if word in known]


def versions() -> dict[str, str]:
    """Return the versions of the libraries that the tests ran on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "accelerate")}


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
