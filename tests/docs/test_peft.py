"""The guide on `inlay.peft`: its example runs, and what it says of the counts is in the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNUSED = {
    "option: Arrow",
    "option: TrainableTokensConfig alone, without another method",
    "option: layer_replication",
    "test: the test is about a method or option that Inlay does not have",
}
"""Reasons that no recorded test was left out for."""
PAGE = (ROOT / "docs" / "guides" / "peft.md").read_text(encoding="utf-8")
PEERS = json.loads((ROOT / "tests" / "peers" / "peers_results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_example_saves_an_adapter(ran: Callable[[str], Path]) -> None:
    assert (ran("guides/peft.md") / "adapter" / "adapter_model.safetensors").is_file()


def test_every_reason_to_leave_a_test_out_was_used() -> None:
    rules = json.loads((ROOT / "tests" / "peers" / "peft_deselected.json").read_text())
    given = {f"test: {reason}" for reason in rules["tests"]}
    given |= {
        f"option: {reason}" for part in ("options", "source") for reason in rules[part].values()
    }
    used = {reason for suite in PEERS.values() for reason in suite["inlay"]["left_out"]}
    assert given - UNUSED <= used


def test_of_the_largest_file_nearly_all_passes_that_passes_on_hf_peft() -> None:
    """The goal is 97% of what HF PEFT itself passes."""
    largest = PEERS["peft/test_custom_models"]
    assert largest["inlay"]["passed"] / largest["peft"]["passed"] > 0.97


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
