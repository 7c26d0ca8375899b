"""The page on `inlay.peft`: its example runs, and what it says of the counts is in the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "tests" / "peers" / "peft_results.json").read_text(encoding="utf-8"))


PEERS = json.loads((ROOT / "tests" / "peers" / "peers_results.json").read_text(encoding="utf-8"))


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/peft.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_counts_of_the_peers_tests_add_up_and_reach_the_goal() -> None:
    ran = RESULTS["passed"] + RESULTS["failed"]
    assert RESULTS["implementation"] == "inlay"
    assert len(RESULTS["failures"]) == RESULTS["failed"]
    assert ran + RESULTS["skipped_by_the_tests_themselves"] == RESULTS["selected"]
    assert RESULTS["passed"] / ran > 0.95
    assert not any("allclose" in words for words in RESULTS["failures"].values())


def test_the_page_has_the_counts() -> None:
    baseline = json.loads((ROOT / "tests" / "peers" / "peft_baseline.json").read_text())
    assert baseline["left_out"] == RESULTS["left_out"]
    for counts in (RESULTS, baseline):
        ran = counts["passed"] + counts["failed"]
        assert f"{counts['passed']:,}" in PAGE
        assert f"{ran:,}" in PAGE
    by_name = {k: n for k, n in RESULTS["left_out"].items() if k.startswith("test: ")}
    about_others = "test: the test is about a method, option or layer kind left out above"
    assert all(f"({n})" in PAGE for k, n in by_name.items() if k != about_others)


def test_every_reason_to_leave_a_test_out_was_used() -> None:
    rules = json.loads((ROOT / "tests" / "peers" / "peft_deselected.json").read_text())
    given = {f"test: {reason}" for reason in rules["tests"]}
    given |= {f"layer: {reason}" for reason in rules["models"].values()}
    given |= {f"option: {reason}" for reason in rules["options"].values()}
    used = {*RESULTS["left_out"], *(r for s in PEERS.values() for r in s["inlay"]["left_out"])}
    unused = {
        "option: Arrow", "option: aLoRA", "layer: bare parameters",
        "test: it wraps a model a second time, which Inlay refuses",
    }  # fmt: skip
    assert given - unused <= used


@pytest.mark.parametrize("suite", PEERS)
def test_the_page_has_the_counts_of_each_file(suite: str) -> None:
    ours, theirs = PEERS[suite]["inlay"], PEERS[suite]["peft"]
    assert (ours["run"], ours["left_out"]) == (theirs["run"], theirs["left_out"])
    for counts in (ours, theirs):
        ran = counts["passed"] + counts["failed"]
        assert len(counts["failures"]) == counts["failed"]
        assert ran + counts["skipped_by_the_tests_themselves"] == counts["run"]
    assert not any("allclose" in said for said in ours["failures"].values())
    project, _, file = suite.partition("/")
    cells = (
        f"`{file}`" if project == "peft" else f"TRL `{file}`",
        f"{ours['run']:,} of {ours['selected']:,} of {ours['collected']:,}",
        f"{theirs['passed']:,}",
        f"{ours['passed']:,}",
    )
    assert f"| {' | '.join(cells)} |" in PAGE
