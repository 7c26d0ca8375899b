"""TRL's fused head on an adapted model: the same scores, whatever it is asked for."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
import trl.trainer.utils
from accelerate.utils import convert_outputs_to_fp32
from transformers import LlamaConfig, LlamaForCausalLM

from inlay.kernels.switches import plain
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach
from inlay.model.adapters.registry import adapter_places
from inlay.model.fast.trl_head import asked_for

IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 0, 8]])
LABELS = torch.where(IDS > 4, IDS, -100)
SCORES = ("log_probs", "entropy", "mean_logits", "is_top1")


def model(targets: list[str], **asked: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    found = attach(LlamaForCausalLM(config), LoRA(rank=2), targets=targets)
    for _, params in adapter_places(found, "default"):
        torch.nn.init.normal_(params.B, std=0.2)
    trl.trainer.utils.add_fused_lm_head(found, **asked)
    return found.train()


def scores(found: Any) -> Any:
    return found(input_ids=IDS, labels=LABELS, fused_lm_head=True)


@pytest.mark.parametrize(
    "asked",
    [
        {"outputs": SCORES},
        {"outputs": (*SCORES, "log_sum_sq_probs")},
        {"outputs": ("log_probs",), "temperature": 0.7},
    ],
    ids=["ours", "one that is not ours", "a temperature"],
)
def test_scores_are_those_of_trl(asked: dict[str, Any]) -> None:
    found = model(["q_proj"], **asked)
    ours = scores(found)
    with plain():
        theirs = scores(found)
    for name in asked["outputs"]:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)


def test_what_is_not_plain_is_left_to_trl() -> None:
    assert asked_for(model(["q_proj"], outputs=SCORES).forward) == set(SCORES)
    assert asked_for(model(["q_proj"], cast_lm_head_to_fp32=True).forward) is None
    assert asked_for(model(["q_proj"], outputs=("log_sum_sq_probs",)).forward) is None


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_temperature_divides_the_logits_and_the_gradient_follows(targets: list[str]) -> None:
    found = model(targets, temperature=0.7)
    trained = [p for p in found.parameters() if p.requires_grad]
    logits = found(input_ids=IDS).logits[:, :-1] / 0.7
    wanted = logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    mask = LABELS[:, 1:] != -100
    expected = torch.autograd.grad(wanted[mask].square().sum(), trained)
    ours = scores(found)
    torch.testing.assert_close(ours.log_probs[mask], wanted[mask], rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(ours.log_probs.square().sum(), trained)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)


def test_what_trl_asks_is_read_through_accelerates_wrapping() -> None:
    found = model(["q_proj"], outputs=SCORES)
    inner = vars(found)["forward"].__func__
    outer = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(inner))
    assert asked_for(MethodType(outer, found)) == set(SCORES)
    assert asked_for(LlamaForCausalLM.forward) is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_an_adapter_on_the_head_is_never_read_past(training: bool, frozen: bool) -> None:
    found = model(["q_proj", "lm_head"], outputs=SCORES).train(training)
    found.requires_grad_(not frozen)
    for parameter in found.model.parameters():
        parameter.requires_grad_(False)
    logits = found(input_ids=IDS).logits
    wanted = logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    ours = scores(found)
    mask = LABELS[:, 1:] != -100
    torch.testing.assert_close(ours.log_probs[mask], wanted[mask], rtol=1e-4, atol=1e-5)
    mean = logits[:, :-1].mean(-1)
    torch.testing.assert_close(ours.mean_logits[mask], mean[mask], rtol=1e-4, atol=1e-5)
