"""One run here and the same in TRL + peft, from the same adapter on the same batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

import inlay
from inlay.train.config import RunConfig, load_config

STEPS = 10


def run_file(folder: Path, rows: Sequence[dict[str, Any]], **keys: Any) -> RunConfig:
    """Return a run of ten steps in float32 on these rows, none of them held out."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "model": "pocket", "dtype": "float32", "data": str(folder / "rows.jsonl"),
        "output": str(folder / "out"), "split": [1.0, 0.0, 0.0], "evaluate": False,
        "batch_size": len(rows), "gradient_accumulation": 1, "max_steps": STEPS, "warmup": 0,
        "scheduler": "constant", "learning_rate": 1e-3, "beta": 0.2, "log_every": 1,
        "save_every": STEPS, "keep_checkpoints": 2, "threads": 1,
    }  # fmt: skip
    lora = {} if "method" in keys else {"rank": 8, "alpha": 12}
    return load_config(None, {**run, **lora, **keys})


def own_curve(config: RunConfig) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of the steps."""
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def peers_curve(
    config: RunConfig,
    trainer: type[Any],
    arguments: type[Any],
    rows: Sequence[dict[str, Any]],
    **own: Any,
) -> list[dict[str, Any]]:
    """Return TRL's log of the same run on HF PEFT's model, from the adapter ours began with."""
    model, tokenizer = inlay.load(config.model, dtype="float32")
    start = Path(config.output) / "checkpoints" / "checkpoint-0" / "adapter"
    args = arguments(
        output_dir=f"{config.output}-peer",
        max_steps=STEPS,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        beta=config.beta,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **own,
    )
    peer = trainer(
        model=PeftModel.from_pretrained(model, start, is_trainable=True),
        args=args,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
    )
    peer.train()
    return [entry for entry in peer.state.log_history if "loss" in entry]
