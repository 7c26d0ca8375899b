"""A model is cast after its adapters are on: it computes the same, and adapters lose nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.methods.full import Full
from inlay.model.adapters.registry import adapter_places

IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
METHODS = {
    "lora": inlay.LoRA(rank=4),
    "dora": inlay.DoRA(rank=4),
    "ia3": inlay.IA3(),
    "bottleneck": inlay.Bottleneck(reduction=8),
    "prefix": inlay.PrefixTuning(tokens=3),
    "norms": inlay.NormTuning(),
    "full": Full(),
}
CASTS = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float64: 1e-5}
"""The dtype that a model is cast to, and how far off its rounding may lead, in relative terms."""


def randomised(model: Any, size: float = 0.05) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for p in params.parameters():
                p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def adapted(method: str, storage: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    model = inlay.quantize(LlamaForCausalLM(config), storage)
    targets = "norm" if method == "full" else None
    return randomised(inlay.attach(model, METHODS[method], targets=targets)).eval()


def far(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_there_and_back(method: str, storage: str, dtype: torch.dtype) -> None:
    model = adapted(method, storage)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    wanted = logits(model)
    model.to(dtype)
    assert logits(model).dtype == dtype
    assert far(logits(model), wanted) < CASTS[dtype]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.promote_types(dtype, torch.float32)}
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in trained.values())
    model.eval().float()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert far(logits(model), wanted) < CASTS[dtype]


@pytest.mark.parametrize("scale", [100.0, 1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_rows_of_tiny_norm_in_fp16(storage: str, scale: float) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 48, bias=False))
    with torch.no_grad():
        layer[0].weight.mul_(scale)
        layer[0].weight[3] = 0
    model = inlay.attach(inlay.quantize(layer, storage), inlay.DoRA(rank=4), targets="0")
    randomised(model, 0.1 * scale)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    wanted = model(x)
    got = model.half()(x.half())
    step = 2.0**-24  # fp16's smallest number, to which tiny weights and outputs are rounded
    assert bool(got.isfinite().all())
    assert far(got, wanted) < 1e-3 + 50 * step / float(wanted.detach().abs().max())
