"""The pages on tasks run, and what their run files train is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_blocks import hooks, pages

from inlay.run.config import RunConfig
from inlay.tasks import TASKS

PAGES = {path: text for path, text in pages().items() if path.startswith("tasks/")}
PREFERRED, LABELLED = ("accuracy", "margin"), ("auc", "reward_margin")
"""What says how well the model tells answers apart, for either kind of rows."""
OUTPUTS = {"dpo": "preferred", "kto": "desirable", "orpo": "odds"}
"""The folders of the runs whose learning is tested."""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_end(page: str, ran: Callable[[str], Path]) -> None:
    ran(page)


@pytest.mark.slow
@pytest.mark.parametrize("task", OUTPUTS)
def test_the_liked_ending_becomes_the_likelier_one(task: str, ran: Callable[[str], Path]) -> None:
    trained = read_run(ran(f"tasks/{task}.md") / OUTPUTS[task])
    metrics = {metric["name"]: metric for metric in trained["comparison"]["metrics"]}
    labelled = trained["task"] == "kto"
    told, margin = (metrics[n] for n in (LABELLED if labelled else PREFERRED))
    assert told["rows"] == trained["rows"]["test"] >= 15
    assert told["tuned"]["value"] > told["base"]["value"] + (0.2 if labelled else 0.5)
    assert told["p_value"] < 0.01
    assert metrics["loss"]["difference"]["high"] < 0 < margin["difference"]["low"]


@pytest.mark.slow
def test_the_rewards_of_the_page_are_measured(ran: Callable[[str], Path]) -> None:
    run = read_run(ran("tasks/grpo.md") / "rewarded")
    names = {metric["name"] for metric in run["comparison"]["metrics"]}
    assert {"reward", "sampled_reward", "reward_ends_in_a_number", "kl"} <= names
    assert len(run["rewards_sha256"]) == 64


def read_run(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_every_task_has_a_page_and_stands_in_the_table() -> None:
    assert set(PAGES) == {"tasks/index.md", *(f"tasks/{name}.md" for name in TASKS)}
    for name in TASKS:
        assert f"| [`{name}`]({name}.md)" in PAGES["tasks/index.md"]


@pytest.mark.parametrize("name", TASKS)
def test_every_key_that_a_task_has_or_refuses_is_on_its_page(name: str) -> None:
    task = TASKS[name]
    own = task.options.model_fields.keys() - RunConfig.model_fields.keys()
    for key in (*own, *task.fixed):
        assert f"| `{key}` |" in PAGES[f"tasks/{name}.md"]
    assert hooks().task_keys(name) in PAGES[f"tasks/{name}.md"]
