"""The same reward run here and in TRL + peft gives the same loss and margin at every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from trl import RewardConfig, RewardTrainer

import inlay
from inlay.data.reports import generate_reports
from inlay.train.config import RunConfig, load_config
from inlay.train.rows import rows_of_run
from inlay.train.run import train

STEPS = 10
PAIRS = 8
"""All of them in every batch, so that no order of rows can make a difference."""


def run_file(folder: Path) -> RunConfig:
    reports = generate_reports(PAIRS, seed=0)
    others = [*reports[1:], reports[0]]
    rows = [
        {"prompt": f"{r.findings}\nImpression:", "chosen": r.impression, "rejected": o.impression}
        for r, o in zip(reports, others, strict=True)
        if r.impression != o.impression
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "task": "reward", "model": "pocket", "dtype": "float32",
        "data": str(folder / "pairs.jsonl"), "output": str(folder / "out"),
        "split": [1.0, 0.0, 0.0], "evaluate": False, "batch_size": PAIRS,
        "gradient_accumulation": 1, "max_steps": STEPS, "warmup": 0, "scheduler": "constant",
        "learning_rate": 3e-3, "rank": 8, "alpha": 12, "log_every": 1, "save_every": STEPS,
        "keep_checkpoints": 2, "threads": 1,
    }  # fmt: skip
    return load_config(None, keys)


def peers_curve(config: RunConfig, start: Path, folder: Path) -> list[dict[str, Any]]:
    head = inlay.Head("sequence", seed=config.seed)
    model, tokenizer = inlay.load("pocket", dtype="float32", head=head)
    peft_model = PeftModel.from_pretrained(model, start, is_trainable=True)
    args = RewardConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = Dataset.from_list(rows_of_run(config).train.rows)
    trainer = RewardTrainer(peft_model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, on its arguments' names
def test_loss_and_margin_agree_with_trl_and_peft(tmp_path: Path) -> None:
    config = run_file(tmp_path)
    train(config)
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    mine = [line for line in lines if "loss" in line]
    start = tmp_path / "out" / "checkpoints" / "checkpoint-0" / "adapter"
    peers = peers_curve(config, start, tmp_path / "peer")
    assert len(mine) == len(peers) == STEPS
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.1
    for ours, theirs in zip(mine, peers, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.005, abs=1e-3)
        assert ours["reward_margin"] == pytest.approx(theirs["margin"], rel=0.005, abs=2e-3)
        assert ours["reward_accuracy"] == theirs["accuracy"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
