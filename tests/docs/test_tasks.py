"""The page on tasks: its run files run on pocket, and the answers that are liked gain."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from demo_data.reports import generate_reports

from inlay.cli.main import main
from inlay.train.tasks import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


KEYS = ("data", "output")
PREFERRED, LABELLED = ("accuracy", "margin"), ("auc", "reward_margin")
"""What says how well the model tells answers apart, for either kind of rows."""
TRIED = ("dpo", "kto", "orpo")
"""The tasks whose run file on the page is run."""
WRITTEN = ["--generate-rows", "4", "--generate-tokens", "24"]
"""As much text as the run files ask for."""
LIKED, OTHER = "End of the report.", "Thanks."
"""What a reader likes reports to end in, and what not."""


def rows_of(task: str) -> list[dict[str, Any]]:
    """Return generated reports as the task has its rows."""
    found = []
    for number, report in enumerate(generate_reports(100, seed=0)):
        prompt = {"prompt": f"Findings: {report.findings}\nImpression:"}
        liked, other = (f"{report.impression} {ending}" for ending in (LIKED, OTHER))
        if task == "kto":
            label = number % 2 == 0
            found.append({**prompt, "completion": liked if label else other, "label": label})
        else:
            found.append({**prompt, "chosen": liked, "rejected": other})
    return found


def run_file(task: str) -> str:
    """Return the page's run file of a task; orpo's is said to be dpo's."""
    whose = "dpo" if task == "orpo" else task
    (text,) = re.findall(rf"```yaml\n(task: {whose}\n.*?)```", PAGE, re.DOTALL)
    return str(text).replace(f"task: {whose}", f"task: {task}")


@pytest.fixture(scope="module", params=TRIED)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the page's run says of itself, on generated reports whose reader likes one ending."""
    folder = tmp_path_factory.mktemp("page")
    text = run_file(request.param)
    (folder / "run.yaml").write_text(text)
    data, output = (re.findall(rf"^{key}: (.*)$", text, re.MULTILINE)[0] for key in KEYS)
    rows = rows_of(request.param)
    (folder / data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml"]) == 0
        assert main(["eval", "--adapter", output, "--data", data, "--json", *WRITTEN]) == 0
    return json.loads((folder / output / "run.json").read_text())


@pytest.mark.slow
def test_the_liked_ending_becomes_the_likelier_one(trained: dict[str, Any]) -> None:
    metrics = {metric["name"]: metric for metric in trained["comparison"]["metrics"]}
    labelled = trained["task"] == "kto"
    told, margin = (metrics[n] for n in (LABELLED if labelled else PREFERRED))
    assert told["rows"] == trained["rows"]["test"] >= 15
    assert told["tuned"]["value"] > told["base"]["value"] + (0.2 if labelled else 0.5)
    assert told["p_value"] < 0.01
    assert metrics["loss"]["difference"]["high"] < 0 < margin["difference"]["low"]


@pytest.mark.slow
def test_the_page_on_rewards_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (functions,) = re.findall(r"```python\n(# rewards\.py\n.*?)```", PAGE, re.DOTALL)
    (tmp_path / "rewarded.yaml").write_text(run_file("grpo"))
    (tmp_path / "rewards.py").write_text(functions)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "rewarded.yaml"]) == 0
    run = json.loads((tmp_path / "rewarded" / "run.json").read_text())
    names = {metric["name"] for metric in run["comparison"]["metrics"]}
    assert {"reward", "sampled_reward", "reward_ends_in_a_number", "kl"} <= names
    assert len(run["rewards_sha256"]) == 64


def test_every_task_stands_in_the_table_and_every_key_it_refuses_on_the_page() -> None:
    table = PAGE.partition("| task |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(TASKS)
    for task in TASKS.values():
        for key in (*task.own, *task.fixed):
            assert f"`{key}`" in PAGE
