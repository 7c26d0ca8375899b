"""A task is one folder: a toy task, put into a copy of the source, goes through every verb."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from toys import SOURCE, command

TASK = '''"""Toy: the second half of a text from its first half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from inlay.data.raw import RawRow
from inlay.data.rows import Rows, normalise
from inlay.run.config import RunConfig, Text
from inlay.train.task import Task, register


class ToyConfig(RunConfig):
    """A run of the toy task."""

    saying: Text = Field("saying", description="toy: column of the text; default: saying")


class Toy(Task):
    name = "toy"
    about = "the second half of a text from its first half"
    options = ToyConfig
    learning_rate_factor = 2.0

    def read(self, raw: Sequence[RawRow], config: ToyConfig, group: str | None) -> Rows:
        text = config.saying
        return normalise(raw, text=text, group=group, skip_empty=config.skip_empty)

    def fits(self, row: RawRow, keys: Any) -> bool:
        return "saying" in row.values

    def run(self, config: ToyConfig) -> Any:
        from inlay.tasks.toy.run import ToyRun

        return ToyRun(self, config)


register(Toy())
'''

RUN = '''"""A run of the toy task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments

from inlay.data.rows import Rows
from inlay.data.tokens import Encoded, encode
from inlay.evaluate.comparison import Limits
from inlay.evaluate.losses import losses
from inlay.evaluate.supervised import compare
from inlay.model.fast.padding import length_multiple
from inlay.train.arguments import shared
from inlay.train.collate import Padded, labels
from inlay.train.language_run import LanguageRun
from inlay.train.task_run import Setup
from inlay.train.trainer import AdapterLoop


class ToyTrainer(AdapterLoop):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs, use_cache=False).loss


class ToyRun(LanguageRun[Any, Encoded]):
    def encode(self, rows: Rows) -> list[Encoded]:
        whole = encode(rows, self.reader, self.config.max_length)
        halves = [len(row.input_ids) // 2 for row in whole]
        return [
            replace(row, trained=[i >= half for i in range(len(row.input_ids))])
            for row, half in zip(whole, halves, strict=True)
        ]

    def texts(self, row: Encoded) -> Sequence[Encoded]:
        return [row]

    def columns(self, rows: Sequence[Encoded]) -> dict[str, list[Any]]:
        return {
            "input_ids": [row.input_ids for row in rows],
            "labels": [labels(row) for row in rows],
        }

    def collator(self, rows: Sequence[Encoded], multiple: int) -> Padded:
        return Padded(multiple)

    def full_row(self) -> Encoded:
        length = self.config.max_length
        return Encoded([0] * length, [True] * length, length)

    def trainer(self, setup: Setup[Encoded]) -> ToyTrainer:
        model, rows = setup.model, setup.tokens.train
        rate = setup.learning_rate
        arguments = shared(TrainingArguments, self.config, model, setup.checkpoints, rate)
        held_out = setup.tokens.validation
        return ToyTrainer(
            model,
            setup.tokenizer,
            Dataset.from_dict(self.columns(rows)),
            TrainingArguments(**arguments),
            collate=self.collator(rows, length_multiple(model)),
            held_out=(lambda: {"loss": mean_loss(model, held_out)}) if held_out else None,
            **setup.watched,
        )

    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[Encoded], limits: Limits
    ) -> Any:
        return compare(model, self.tokenizer, rows, encoded, **limits).to_dict()


def mean_loss(model: PreTrainedModel, rows: list[Encoded]) -> float:
    found = losses(model, rows, 4)
    return sum(row.nll for row in found) / sum(row.tokens for row in found)
'''
COLOURS = ("red", "green", "blue", "black", "white")


@pytest.mark.slow
def test_a_toy_task_goes_through_every_verb(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source / "inlay", ignore=shutil.ignore_patterns("__pycache__"))
    folder = source / "inlay" / "tasks" / "toy"
    folder.mkdir()
    (folder / "__init__.py").write_text(TASK)
    (folder / "run.py").write_text(RUN)
    rows = [{"saying": f"{a} comes before {b}"} for a in COLOURS for b in COLOURS if a != b]
    (tmp_path / "sayings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ("--model", "pocket", "--data", "sayings.jsonl", "--task", "toy")

    shown = json.loads(command(source, ("data", *common, "--json"), tmp_path))
    assert shown["parts"]["train"]["rows"] == 16
    assert 0 < shown["parts"]["train"]["trained_tokens"] < shown["parts"]["train"]["tokens"]

    planned = json.loads(command(source, ("plan", *common, "--method", "lora", "--json"), tmp_path))
    assert planned["largest_batch"]["rows"] == 4
    assert not planned["largest_batch"]["assumed"]

    few = ("--max-steps", "6", "--gradient-accumulation", "1", "--output", "run")
    command(source, ("train", *common, *few), tmp_path)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["task"], run["config"]["saying"], run["finished"]) == ("toy", "saying", True)
    assert "lora, toy" in run["learning_rate"]["reason"]
    (loss, *_) = run["comparison"]["metrics"]
    assert loss["name"] == "loss"
    assert loss["tuned"]["value"] < loss["base"]["value"]

    measured = json.loads(
        command(source, ("eval", "--adapter", "run", "--data", "sayings.jsonl", "--json"), tmp_path)
    )
    assert measured["rows_held_out_by_the_run"] is True
    assert measured["metrics"][0]["tuned"]["value"] == pytest.approx(loss["tuned"]["value"])

    merged = ("merge", "--adapter", "run", "--output", "merged", "--json")
    record = json.loads(command(source, merged, tmp_path))
    assert record["rows"] if "rows" in record else record["checked"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()
