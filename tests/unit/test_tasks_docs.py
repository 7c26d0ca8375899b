"""The page on tasks: its run file runs on pocket, and the preferred answers become the likelier."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from inlay.cli.main import main
from inlay.data.reports import generate_reports
from inlay.train.tasks import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's run says of itself, on generated reports whose reader likes one ending."""
    folder = tmp_path_factory.mktemp("page")
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (folder / "preferred.yaml").write_text(text)
    rows = [
        {
            "prompt": f"Findings: {report.findings}\nImpression:",
            "chosen": f"{report.impression} End of the report.",
            "rejected": f"{report.impression} Thanks.",
        }
        for report in generate_reports(100, seed=0)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "preferred.yaml"]) == 0
        assert main(["eval", "--adapter", "preferred", "--data", "pairs.jsonl", "--json"]) == 0
    return json.loads((folder / "preferred" / "run.json").read_text())


@pytest.mark.slow
def test_accuracy_rises_on_held_out_pairs(trained: dict[str, Any]) -> None:
    metrics = {metric["name"]: metric for metric in trained["comparison"]["metrics"]}
    accuracy = metrics["accuracy"]
    assert accuracy["rows"] == trained["rows"]["test"] >= 15
    assert accuracy["tuned"]["value"] > accuracy["base"]["value"] + 0.5
    assert accuracy["p_value"] < 0.01
    assert metrics["loss"]["difference"]["high"] < 0 < metrics["margin"]["difference"]["low"]


def test_every_task_stands_in_the_table_and_every_key_it_refuses_on_the_page() -> None:
    assert set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)) == set(TASKS)
    for task in TASKS.values():
        for key in (*task.own, *task.fixed):
            assert f"`{key}`" in PAGE
