"""`scripts/compare_losses.py` sees a loss, a tensor, a figure and a plan that differ."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from compare_losses import compared, trained  # noqa: E402
from loss_cases import METHODS, cases, make_llama, make_text_data  # noqa: E402

from inlay.methods.catalog import catalog  # noqa: E402
from inlay.storage.registry import STORAGES  # noqa: E402
from inlay.tasks import TASKS  # noqa: E402


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of one run that the script trained."""
    inputs = tmp_path_factory.mktemp("inputs")
    make_llama(inputs / "llama")
    make_text_data(inputs)
    [case] = [case for case in cases(full=False) if case.name == "sft/lora/dense"]
    [result] = trained(ROOT / "src", [case], inputs, tmp_path_factory.mktemp("run"))
    return result


def test_a_run_is_equal_to_itself(found: dict[str, Any]):
    row = compared("sft", found, found)
    assert (row["result"], row["differs"], row["words"]) == ("trained", [], 0)
    assert row["processor"] == row["steps_per_second"] == 1
    assert len([line for line in found["metrics"] if "loss" in line]) == 8
    [tensors] = found["adapter"].values()
    assert len(tensors) == 28
    assert [metric["name"] for metric in found["comparison"]["metrics"]][:2] == [
        "loss", "perplexity",
    ]  # fmt: skip
    assert found["plan"]["parts"]["activations"] > 0


def test_every_part_that_differs_is_named(found: dict[str, Any]):
    other = copy.deepcopy(found)
    other["metrics"][1]["loss"] += 1e-12
    tensors = next(iter(other["adapter"].values()))
    tensors[next(iter(tensors))][2] = "0" * 64
    other["comparison"]["metrics"][0]["tuned"]["value"] += 1e-9
    other["plan"]["parts"]["activations"] += 1
    differs = compared("sft", found, other)["differs"]
    assert [line.split(":")[0] for line in differs] == ["metrics", "adapter", "comparison", "plan"]


def test_a_run_that_only_one_commit_refuses_differs(found: dict[str, Any]):
    refused = {"code": 2, "said": "inlay: a reason", "processor": 1.0}
    assert "0 -> 2: inlay: a reason" in compared("sft", found, refused)["differs"][0]
    reworded = compared("sft", refused, {**refused, "said": "inlay: a better sentence"})
    assert (reworded["differs"], reworded["words"]) == ([], 1)


def test_every_method_and_storage_is_compared():
    names = [case.name.split("/") for case in cases(full=True)]
    assert METHODS.keys() == catalog().keys()
    assert {name[2] for name in names if len(name) == 3} == {"dense", *STORAGES}
    assert {case.keys.get("task", "sft") for case in cases(full=False)} == TASKS.keys()
