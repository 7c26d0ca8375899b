"""A plan, whose model has no values, adapts the layers that the run's model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import inlay
from inlay.memory.devices import Device
from inlay.memory.simulate import fake_tensors
from inlay.memory.skeleton import skeleton
from inlay.methods.catalog import build_method
from inlay.model.adapters.registry import adapter_places
from inlay.run.config import RunConfig
from inlay.storage.registry import kind
from inlay.tasks import TASKS
from inlay.train import planning

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


class Half(nn.Linear):
    """A layer that computes something else than its product."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


class WithHalves(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.o_proj = Half(32, 32, bias=False)


MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "falcon": (FalconForCausalLM, FalconConfig(**SMALL)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=48),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    "experts": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            num_experts=4,
            moe_intermediate_size=16,
            num_experts_per_tok=2,
        ),
    ),
    "halves": (WithHalves, LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48)),
}


def real(name: str) -> PreTrainedModel:
    cls, config = MODELS[name]
    config.architectures = [cls.__name__]
    torch.manual_seed(0)
    return cls(config)


def shapes(model: PreTrainedModel) -> dict[str, list[torch.Size]]:
    places = adapter_places(model, "default")
    return {name: [p.shape for p in params.parameters()] for name, params in places}


@pytest.mark.parametrize("name", MODELS)
def test_layers_without_values_are_of_the_kind_of_real_ones(name: str) -> None:
    model = real(name)
    with fake_tensors():
        planned = real(name)
        found = {n: kind(m) for n, m in planned.named_modules()}
        inlay.attach(planned, inlay.LoRA())
    assert found == {n: kind(m) for n, m in model.named_modules()}
    assert shapes(planned) == shapes(inlay.attach(model, inlay.LoRA()))


METHODS = [inlay.LoRA(), inlay.DoRA(), inlay.IA3(), inlay.Bottleneck()]
PAIRS = [
    (name, method)
    for name in MODELS
    for method in METHODS
    if name != "halves"  # of no class of transformers, from which a skeleton is made
    and (name, method.name) != ("experts", "bottleneck")  # no layer ends an expert's block
]


@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_plans_model_has_the_adapters_of_the_runs(name: str, storage: str, method: Any) -> None:
    model = real(name)
    with fake_tensors():
        planned = skeleton(model.config, storage, double_quant=True, dtype="float32")
        inlay.attach(planned, method)
    inlay.attach(model if storage == "dense" else inlay.quantize(model, storage), method)
    assert shapes(planned) == shapes(model)
    assert shapes(model)


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_a_planned_step_trains_what_the_runs_model_does(
    storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = real("experts")
    run = RunConfig(
        model="unused", data="reports", output="unused", method="lora", storage=storage,
        max_length=32, batch_size=2,
    )  # fmt: skip
    monkeypatch.setattr(planning, "held_by_process", lambda *_: 0)
    device = Device("a CPU", "cpu", 1 << 36, 1e10, 1e11, 1e11)
    rows = TASKS["sft"].run(run).assumed()
    found = planning.planned_step(model.config, rows, device)
    inlay.attach(model, build_method("lora"))
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert found.trained == sum(trained.values())
    assert any("experts" in name for name in trained)
