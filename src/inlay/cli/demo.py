"""`inlay demo`: a whole run, offline, on the embedded model and generated reports."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from inlay.cli import show, summary
from inlay.cli.options import Parser, checked, same
from inlay.cli.progress import progress
from inlay.run.config import Text
from inlay.run.flags import flags_of
from inlay.tasks import TASKS
from inlay.tasks.config import checked_config

if TYPE_CHECKING:
    from inlay.train.run import TrainResult

ABOUT = "Tune the embedded model on generated reports, compare, merge, and write a report."
USAGE = "inlay demo [--output DIR] [flags]"

RUN: dict[str, Any] = {
    "model": "pocket",
    "data": "reports",
    "method": "lora",
    "rank": 16,
    "alpha": 32,
    "max_length": 256,
    "batch_size": 8,
    "gradient_accumulation": 1,
    "max_steps": 600,
    "learning_rate": 3e-3,
    "log_every": 10,
    "eval_rows": 150,
    "generate_rows": 60,
    "generate_tokens": 40,
}
"""The demo's run: sizes for a small model on two CPU cores."""
MERGE_ROWS = 16


class DemoOptions(BaseModel):
    """The flags of `inlay demo`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    output: Text = Field("demo", description="folder for the run and its report.html")
    seed: int = same("seed")
    threads: PositiveInt | None = same("threads")


def parser(argv: Sequence[str]) -> Parser:
    del argv
    found = Parser("demo", USAGE, ABOUT)
    found.add_flags("flags", flags_of(DemoOptions))
    found.add_switches()
    return found


def run(given: dict[str, Any]) -> int:
    options = checked(DemoOptions, given)
    config = checked_config(RUN | options.model_dump() | {"overwrite": True})
    print("Same as: " + command(RUN | {"output": options.output}))
    started = time.monotonic()

    from inlay.train.run import train

    with progress() as drawn:
        result = train(config, on_event=drawn)
        drawn.stage("merging, and comparing the merged model with the adapted model")
        merge = merge_report(result)
        write_page(result, merge)
    summary.what_trained(result.run)
    summary.comparison(result.run["comparison"])
    summary.merged(merge)
    summary.example(result.run["comparison"]["examples"][0])
    show.heading(f"done in {show.duration(time.monotonic() - started)}")
    print(f"  Report with curves: {result.folder.report.resolve()}")
    print("  The same with a hub model and your own data:")
    print("    inlay train --model Qwen/Qwen3-0.6B --data my.jsonl --output run")
    print(f"  More: inlay generate --adapter {options.output} --prompt TEXT; inlay --help")
    return 0


def command(keys: dict[str, Any]) -> str:
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in keys.items())
    return f"inlay train {flags}"


def merge_report(result: TrainResult) -> dict[str, Any]:
    from inlay.model.load.folder import located
    from inlay.model.merge.merge import merge
    from inlay.train.rows import rows_of_run, sample

    assert result.model is not None
    config = checked_config(result.run["config"])
    task = TASKS[config.task]
    run = task.run(config)
    rows = sample(run.answers(rows_of_run(config).test), MERGE_ROWS)
    run.read_by(located(config.model, config.revision), rows.pictured)
    inputs = run.merge_inputs(result.model, rows)
    return {**asdict(merge(result.model, inputs=inputs)), "rows": len(rows)}


def write_page(result: TrainResult, merge: dict[str, Any]) -> None:
    from inlay.evaluate.record import Merge, Run, Step
    from inlay.evaluate.report import write_report
    from inlay.train.output.recorder import read_metrics

    write_report(
        result.folder.report,
        cast(Run, result.run),
        cast("list[Step]", read_metrics(result.folder.metrics)),
        result.run["comparison"],
        cast(Merge, merge),
    )
