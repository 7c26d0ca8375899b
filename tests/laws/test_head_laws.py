"""The laws of an output head that is held apart from the rest, over every storage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from law_cases import IDS, built, far, logits, randomise_adapter
from torch import Tensor, nn

from inlay.checkpoint.adapter import load_adapter, save_adapter
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach
from inlay.model.load.quantize import quantize
from inlay.model.merge.merge import merge
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.registry import STORAGES

HEADS = [(body, head) for body in ("dense", *STORAGES) for head in STORAGES]
every_pair = pytest.mark.parametrize(("body", "head"), HEADS)


def held(body: str, head: str) -> Any:
    """A model whose output head is held otherwise than it would be by default."""
    return quantize(built("qwen2"), body, head_storage=head)


def dense_twin(model: Any) -> Any:
    """The same function, every packed layer a dense one."""
    twin = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            layer = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            with torch.no_grad():
                layer.weight.copy_(module.dequantize())
                if module.bias is not None:
                    layer.bias.copy_(module.bias)
            twin.set_submodule(name, layer)
    return twin.requires_grad_(False)


def adapted(model: Any) -> Any:
    """LoRA on a block's layers and on the head, away from where it started."""
    attach(model, LoRA(rank=3), targets=["q_proj", "up_proj", "lm_head"], seed=1)
    randomise_adapter(model)
    return model


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training step and the adapter's gradients."""
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@every_pair
@pytest.mark.parametrize("on_head", [True, False])
def test_loss_and_gradient_are_those_of_the_dense_head(body: str, head: str, on_head: bool) -> None:
    model = held(body, head)
    assert model.lm_head.storage == head
    places = ["q_proj", "up_proj", *(["lm_head"] if on_head else [])]
    sides = [attach(m, LoRA(rank=3), targets=places) for m in (model, dense_twin(model))]
    for side in sides:
        randomise_adapter(side)
    (loss, found), (expected_loss, expected) = (trained(side) for side in sides)
    assert far(loss, expected_loss) < 1e-5
    assert found.keys() == expected.keys()
    assert max(far(found[n], expected[n]) for n in found) < 1e-4


@every_pair
def test_generates_as_the_dense_head_does(body: str, head: str) -> None:
    model = held(body, head)
    answers = [
        m.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for m in (model, dense_twin(model))
    ]
    assert torch.equal(*answers)


@every_pair
@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_merged_is_the_adapted(body: str, head: str, target: str, tmp_path: Path) -> None:
    model = held(body, head)
    attach(model, LoRA(rank=3), targets=[target])
    randomise_adapter(model)
    before = logits(model)
    merge(model)
    assert far(logits(model), before) < 2e-5
    formats = {m.storage for m in model.modules() if isinstance(m, QuantizedLinear)}
    assert len(formats) <= 1
    assert body == "dense" or head != body or target == "lm_head" or formats == {head}


@every_pair
def test_adapters_are_saved_and_loaded_bit_for_bit(body: str, head: str, tmp_path: Path) -> None:
    model = adapted(held(body, head))
    save_adapter(model, tmp_path)
    again = held(body, head)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
