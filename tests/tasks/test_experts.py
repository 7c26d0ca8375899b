"""A mixture of experts is balanced by its router's loss in the tasks that score two answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_tiny import losses_of, make_run
from transformers import (
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeForCausalLM,
)

from inlay.train.run import train

EXPERTS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "output_router_logits": True,
}  # fmt: skip


def first_loss(folder: Path, task: str, coefficient: float) -> float:
    """The loss of a run's only step, with the router's loss weighing this much."""
    config = make_run(folder, f"out-{coefficient}", task=task, max_steps=1, log_every=1)
    saved: dict[str, Any] = json.loads((Path(config.model) / "config.json").read_text())
    special = {k: saved[k] for k in ("vocab_size", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    shape = MixtralConfig(**EXPERTS, **special, bos_token_id=None, router_aux_loss_coef=coefficient)
    MixtralForCausalLM(shape).save_pretrained(config.model)
    train(config)
    return next(line["loss"] for line in losses_of(config.output) if "loss" in line)


@pytest.mark.parametrize("task", ["dpo", "kto", "orpo"])
def test_the_loss_holds_the_routers_share(tmp_path: Path, task: str) -> None:
    low, middle, high = (first_loss(tmp_path, task, share) for share in (0.25, 0.5, 0.75))
    assert middle - low == pytest.approx(high - middle, rel=0.01)
    assert (middle - low) / 0.25 >= 1.9, "balanced experts, two a token, have a loss of 2"


@pytest.mark.parametrize(
    "made_as", [MixtralForCausalLM, Qwen3MoeForCausalLM, GraniteMoeForCausalLM]
)
@pytest.mark.parametrize("asked", [False, True])
def test_a_mixture_of_experts_trains_and_answers(tmp_path: Path, made_as: Any, asked: bool) -> None:
    config = make_run(tmp_path, max_steps=2, generate_rows=2, generate_tokens=3)
    saved: dict[str, Any] = json.loads((Path(config.model) / "config.json").read_text())
    special = {k: saved[k] for k in ("vocab_size", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    shape = EXPERTS | special | {"output_router_logits": asked}
    made_as(made_as.config_class(**shape, bos_token_id=None)).save_pretrained(config.model)
    found = train(config)
    assert found.run["comparison"] is not None
    assert found.model is not None
    assert found.model.config.output_router_logits is asked
