"""The same LoRA run here and in TRL + peft: same base, data, order, seed, hyperparameters.

    python -m benchmarks.results.peer_curve

Both start from one saved adapter and train on the real reports in ../shared through TRL's
SFTTrainer; the loss of every logged step is compared, three seeds.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

import inlay
from benchmarks.lib.machine import REPORTS, write

SEEDS = (0, 1, 2)
STEPS = 60
RANK, ALPHA = 16, 24
LEARNING_RATE = 2e-3


def main() -> None:
    """Train both ways for each seed and write the largest relative differences."""
    torch.set_num_threads(2)
    runs = [run(seed) for seed in SEEDS]
    worst = max(r["largest_relative_difference"] for r in runs)
    print(f"largest relative difference over {len(SEEDS)} seeds: {worst:.2e}")
    print(write("peer_curve", {"largest_relative_difference": worst, "runs": runs}))


def run(seed: int) -> dict[str, Any]:
    """Train one seed both ways."""
    with tempfile.TemporaryDirectory() as folder:
        ours, _ = inlay.load("pocket", dtype="float32")
        inlay.attach(ours, inlay.LoRA(rank=RANK, alpha=ALPHA), seed=seed)
        inlay.save_adapter(ours, Path(folder) / "start", base_model="pocket")
        bare, _ = inlay.load("pocket", dtype="float32")
        theirs = PeftModel.from_pretrained(bare, f"{folder}/start", is_trainable=True)
        curves = {
            "inlay": curve(ours, seed, folder),
            "trl_peft": curve(theirs, seed, folder),
        }
    pairs = list(zip(curves["inlay"], curves["trl_peft"], strict=True))
    worst = max(abs(a - b) / b for a, b in pairs)
    print(f"seed {seed}: {pairs[0]} ... {pairs[-1]}, largest relative difference {worst:.2e}")
    return {"seed": seed, "largest_relative_difference": worst, **curves}


def curve(model: Any, seed: int, folder: str) -> list[float]:
    """Return the training loss at every step."""
    _, tokenizer = inlay.load("pocket", dtype="float32")
    config = SFTConfig(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=LEARNING_RATE,
        logging_steps=1,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        max_length=512,
    )
    trainer = SFTTrainer(model, config, train_dataset=rows(), processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows() -> Dataset:
    """Return the real reports as prompt and completion."""
    with REPORTS.open(newline="") as file:
        found = [r for r in csv.DictReader(file) if r["findings"] and r["impression"]]
    texts = [(f"Findings: {r['findings']}\nImpression:", f" {r['impression']}") for r in found]
    return Dataset.from_list([{"prompt": p, "completion": c} for p, c in texts])


if __name__ == "__main__":
    main()
