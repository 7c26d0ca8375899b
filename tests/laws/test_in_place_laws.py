"""A model may change what a layer, a norm or a gate gives it in place, and trains all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_cases import METHODS, STORED, Layer, far, randomise_adapter, seeded
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

import inlay
from inlay.errors import InlayError
from inlay.kernels import opaque
from inlay.methods.base import PromptMethod
from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.fast.base import Fast
from inlay.model.fast.install import install

LAYERS = {"linear": Layer("linear", width=48), "conv1d": Layer("conv1d", width=48)}
CHANGES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "add": (lambda y: y.add_(1), lambda y: y + 1),
    "scale": (lambda y: y.mul_(y.detach().cos()), lambda y: y * y.detach().cos()),
    "a part": (lambda y: y[..., :7].zero_(), lambda y: y * (torch.arange(y.shape[-1]) >= 7)),
    "by a mask": (
        lambda y: y.masked_fill_(torch.arange(y.shape[-1]) < 7, 2.0),
        lambda y: y.masked_fill(torch.arange(y.shape[-1]) < 7, 2.0),
    ),
}


def changed_as_it_should(call: Callable[[Tensor], Tensor], x: Tensor, wrt: list[Tensor]) -> None:
    for in_place, apart in CHANGES.values():
        y = call(x)
        in_place(y)
        wanted = apart(call(x))
        assert far(y, wanted) < 1e-6
        g = torch.randn(y.shape, generator=seeded(5)).to(y.dtype)
        got = torch.autograd.grad(y, wrt, g)
        assert all(
            far(a, b) < 1e-5 for a, b in zip(got, torch.autograd.grad(wanted, wrt, g), strict=True)
        )


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize(
    "method", [n for n, m in METHODS.items() if not isinstance(m, PromptMethod)]
)
def test_an_adapted_layer(method: str, storage: str) -> None:
    for kind, layer in LAYERS.items():
        if STORED[storage].packed and kind != "linear":
            continue
        model = STORED[storage].hold_model(nn.Sequential(layer.build(), nn.Identity()))
        try:
            inlay.attach(model, METHODS[method], targets="0")
        except InlayError:
            continue
        randomise_adapter(model)
        assert isinstance(model[0], AdaptedLayer)
        x = layer.inputs(STORED[storage].dtype).requires_grad_()
        changed_as_it_should(model, x, [x, *(p for p in model.parameters() if p.requires_grad)])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fast_module(dtype: torch.dtype, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if traced:
        monkeypatch.setattr(opaque, "traced", lambda args: True)
    config = LlamaConfig(hidden_size=48, intermediate_size=64, num_attention_heads=4)
    for module in (nn.Linear(48, 40), LlamaRMSNorm(48), LlamaMLP(config)):
        model = nn.Sequential(module).to(dtype).requires_grad_(False).train()
        install(model)
        assert isinstance(model[0], Fast)
        x = torch.randn(2, 3, 48, generator=seeded(1)).to(dtype).requires_grad_()
        changed_as_it_should(model, x, [x])
