"""bitsandbytes' 8-bit layers keep no dtype: forward, training and merging in a model of any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.adapters.registry import adapter_places
from inlay.peft import get_peft_model

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 1e-2}
METHODS = {"lora": inlay.LoRA(rank=4), "dora": inlay.DoRA(rank=4)}


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).to(dtype).save_pretrained(folder)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, quantization_config=eight, dtype=dtype
    )


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for p in params.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def far(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


def exact(model: Any) -> Tensor:
    """The logits by the adapted layers' dense weights in fp64."""
    dense: Any = LlamaForCausalLM(CONFIG).double()
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            weight = module.adapted_weight()[0]
        else:
            weight = module._parameters.get("weight")
        if weight is not None:
            dense.get_submodule(name).weight.data = weight.detach().double()
    return logits(dense)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("method", METHODS)
def test_forward_training_and_merge(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomised(inlay.attach(loaded(tmp_path, dtype), METHODS[method]))
    wanted = exact(model)
    assert far(logits(model), wanted) < ROUNDING[dtype]
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    report = inlay.merge(model)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert far(logits(model), wanted) < ROUNDING[dtype]


def test_detach_leaves_no_attribute(tmp_path: Path) -> None:
    model = loaded(tmp_path, torch.float32)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    inlay.detach(inlay.attach(model, METHODS["lora"]))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("dtype", ROUNDING)
def test_merge_and_unload_as_peft_has_it(dtype: torch.dtype, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(loaded(tmp_path, dtype), config)
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert far(logits(merged), wanted) < 2 * ROUNDING[dtype]
