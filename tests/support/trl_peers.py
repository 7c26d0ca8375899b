"""One run here and the same in TRL + peft, from the same adapter on the same batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from demo_data.reports import Report, generate_reports
from peft import PeftModel

import inlay
from inlay.model.load.heads import Head
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config

STEPS = 10


def short_prompt(report: Report) -> str:
    """Return a prompt of a report's first sentence: a fifth of the tokens of them all."""
    return f"{report.findings.split('. ')[0]}.\nImpression:"


def pairs(count: int, rejected: str) -> list[dict[str, Any]]:
    """Return impressions of short findings, each preferred to a part of the next report."""
    reports = generate_reports(count, seed=0)
    both = [
        (r, getattr(o, rejected)) for r, o in zip(reports, reports[1:] + reports[:1], strict=True)
    ]
    return [
        {"prompt": short_prompt(r), "chosen": r.impression, "rejected": other}
        for r, other in both
        if r.impression != other
    ]


def run_file(folder: Path, rows: Sequence[dict[str, Any]], **keys: Any) -> RunConfig:
    """Return a run of ten steps in float32 on these rows, none of them held out."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "model": "pocket", "dtype": "float32", "data": str(folder / "rows.jsonl"),
        "output": str(folder / "out"), "split": [1.0, 0.0, 0.0], "evaluate": False,
        "batch_size": len(rows), "gradient_accumulation": 1, "max_steps": STEPS, "warmup": 0,
        "scheduler": "constant", "learning_rate": 1e-3, "log_every": 1, "save_every": STEPS,
        "keep_checkpoints": 2, "threads": 1,
    }  # fmt: skip
    lora = {} if "method" in keys else {"rank": 8, "alpha": 12}
    return load_config(None, {**run, **lora, **keys})


def own_curve(config: RunConfig) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of the steps."""
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def peers_model(config: RunConfig, head: Head | None = None) -> tuple[PeftModel, Any]:
    """Return HF PEFT's model with the adapter that ours began with, and the tokenizer."""
    model, tokenizer = inlay.load(config.model, dtype="float32", head=head)
    start = Path(config.output) / "checkpoints" / "checkpoint-0" / "adapter"
    return PeftModel.from_pretrained(model, start, is_trainable=True), tokenizer


def plain(output: str, steps: int, batch_size: int, learning_rate: float) -> dict[str, Any]:
    """Return what every trainer of TRL is told here, beside what its task is."""
    return {
        "output_dir": output, "max_steps": steps, "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "gradient_checkpointing": False, "bf16": False, "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip


def of_config(config: RunConfig) -> dict[str, Any]:
    """Return what TRL's trainer of a run is told, beside what its task is."""
    assert config.max_steps is not None
    assert config.learning_rate != "auto"
    told = plain(f"{config.output}-peer", config.max_steps, config.batch_size, config.learning_rate)
    beta = {"beta": getattr(config, "beta")} if hasattr(config, "beta") else {}  # noqa: B009
    return {**told, "lr_scheduler_type": "constant", **beta}


def curve(trainer: Any) -> list[dict[str, Any]]:
    """Return TRL's log of its steps."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def peers_curve(
    config: RunConfig,
    trainer: type[Any],
    arguments: type[Any],
    rows: Sequence[dict[str, Any]],
    head: Head | None = None,
    **own: Any,
) -> list[dict[str, Any]]:
    """Return TRL's log of the same run on HF PEFT's model, from the adapter ours began with."""
    model, tokenizer = peers_model(config, head)
    peer = trainer(
        model=model,
        args=arguments(**of_config(config), **own),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
    )
    return curve(peer)
