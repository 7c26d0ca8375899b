"""The same DPO run on pairs with images, here and in TRL + peft, gives the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from trl import DPOConfig, DPOTrainer
from trl_peers import curve, of_config, own_curve
from vision_tiny import make_vision_run

from inlay.data.image_reader import image_reader
from inlay.train.rows import rows_of_run
from inlay.train.run import train

PAIRS, STEPS = 8, 8
"""All pairs are in every batch, so that no order of rows can make a difference."""


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def as_trl_has_them(rows: list[dict[str, Any]]) -> Dataset:
    """Return pairs as TRL's users write them: messages of text, and a column of images."""
    return Dataset.from_list(
        [
            {
                "images": [picture.open() for picture in row["images"]],
                "prompt": message("user", row["prompt"][-1]["content"][-1]["text"]),
                "chosen": message("assistant", row["chosen"]),
                "rejected": message("assistant", row["rejected"]),
            }
            for row in rows
        ]
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, on its arguments' names
@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_loss_and_margin_agree_with_trl_and_peft(tmp_path: Path, family: str) -> None:
    config = make_vision_run(
        tmp_path, family, task="dpo", count=PAIRS, beta=0.5, dropout=None, batch_size=PAIRS,
        gradient_accumulation=1, max_steps=STEPS, split=[1.0, 0.0, 0.0], evaluate=False, warmup=0,
        scheduler="constant", log_every=1, save_every=STEPS, keep_checkpoints=2, rank=8, alpha=12,
        targets=["language", "vision", "projector"],
    )  # fmt: skip
    train(config)
    mine = own_curve(config)
    base = AutoModelForImageTextToText.from_pretrained(config.model)
    start = Path(config.output) / "checkpoints" / "checkpoint-0" / "adapter"
    peer = DPOTrainer(
        model=PeftModel.from_pretrained(base, start, is_trainable=True),
        args=DPOConfig(**of_config(config), max_length=None),
        train_dataset=as_trl_has_them(rows_of_run(config).train.rows),
        processing_class=image_reader(Path(config.model), None).processor,
    )
    theirs = curve(peer)
    assert len(mine) == len(theirs) == STEPS
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.1
    for own, other in zip(mine, theirs, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=2e-4)
        assert own["reward_margin"] == pytest.approx(other["rewards/margins"], rel=2e-3, abs=1e-3)
        assert own["reward_accuracy"] == other["rewards/accuracies"]
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-3)
