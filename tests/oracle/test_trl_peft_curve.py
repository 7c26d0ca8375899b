"""The same LoRA run here and in TRL + peft gives the same loss at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from demo_data.reports import generate_reports
from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl_peers import curve, plain

import inlay

STEPS = 12


def losses(model: PreTrainedModel | PeftModel, folder: Path) -> list[float]:
    _, tokenizer = inlay.load("pocket", dtype="float32")
    reports = generate_reports(64, seed=0)
    pairs = [(f"{r.findings}\nImpression:", f" {r.impression}") for r in reports]
    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs])
    config = SFTConfig(**plain(str(folder), STEPS, 4, 4e-3), max_length=96)
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    return [entry["loss"] for entry in curve(trainer)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, on its arguments' names
def test_loss_curves_agree_with_trl_and_peft(tmp_path: Path) -> None:
    ours, _ = inlay.load("pocket", dtype="float32")
    inlay.attach(ours, inlay.LoRA(rank=8, alpha=12))
    inlay.save_adapter(ours, tmp_path / "start", base_model="pocket")
    bare, _ = inlay.load("pocket", dtype="float32")
    theirs = PeftModel.from_pretrained(bare, tmp_path / "start", is_trainable=True)

    mine, peers = losses(ours, tmp_path / "a"), losses(theirs, tmp_path / "b")
    assert len(mine) == len(peers) == STEPS
    assert mine[-1] < mine[0] - 0.3
    assert mine == pytest.approx(peers, rel=0.005)
