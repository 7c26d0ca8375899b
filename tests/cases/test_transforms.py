"""Function transforms, forward-mode and second derivatives on adapted models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's
STORAGES = pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: inlay.LoRA(rank=2),
    "dora": lambda: inlay.DoRA(rank=2),
    "ia3": inlay.IA3,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def net(storage: str = "dense", method: str = "lora") -> Net:
    torch.manual_seed(0)
    model = Net()
    if storage != "dense":
        inlay.quantize(model, storage)
    inlay.attach(model, METHODS[method](), targets=["second"])
    return moved(model)


def llama() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, attn_implementation="eager",
    ))  # fmt: skip
    return moved(inlay.attach(model, inlay.LoRA(rank=2))).train()


def moved(model: Any) -> Any:
    """Return a model whose adapter is another than at its start."""
    generator = torch.Generator().manual_seed(1)
    for p in trained(model).values():
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


IDS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module, params: Any, ids: Tensor) -> Tensor:
    found: Any = functional_call(model, params, (), {"input_ids": ids, "labels": ids})
    return found.loss


@STORAGES
@pytest.mark.parametrize("method", METHODS)
def test_a_hessian_by_transforms_is_that_of_torchs_own_operators(storage: str, method: str) -> None:
    model = net(storage, method)

    def scored(x: Tensor) -> Tensor:
        return model(x).pow(2).sum()

    found: Any = torch.func.hessian(scored)(X[:1])
    with inlay.plain():
        wanted: Any = hessian(scored, X[:1])
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@STORAGES
def test_each_row_of_a_batch_has_its_own_gradients(storage: str) -> None:
    model = net(storage)
    params = trained(model)

    def scored(held: Any, x: Tensor) -> Tensor:
        return functional_call(model, held, (x[None],)).pow(2).sum()

    found = vmap(grad(scored), in_dims=(None, 0))(params, X)
    for row, x in enumerate(X):
        wanted = torch.autograd.grad(model(x[None]).pow(2).sum(), list(params.values()))
        for name, one in zip(params, wanted, strict=True):
            torch.testing.assert_close(found[name][row], one, atol=1e-4, rtol=1e-3)


def test_each_row_of_a_language_models_batch_has_its_own_gradients() -> None:
    model = llama()
    params = trained(model)
    found = vmap(grad(lambda p, ids: loss_of(model, p, ids[None])), in_dims=(None, 0))(params, IDS)
    for row, ids in enumerate(IDS):
        loss = model(input_ids=ids[None], labels=ids[None]).loss
        for name, one in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            torch.testing.assert_close(found[name][row], one, atol=1e-5, rtol=1e-3)


def test_a_derivative_in_a_direction_is_the_gradient_in_it() -> None:
    model = llama()
    params = trained(model)
    ones = {name: torch.ones_like(p) for name, p in params.items()}
    _, found = jvp(lambda p: loss_of(model, p, IDS), (params,), (ones,))
    loss = model(input_ids=IDS, labels=IDS).loss
    wanted = sum(g.sum() for g in torch.autograd.grad(loss, list(params.values())))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def product(model: Any) -> Any:
    """Return a Hessian's product with ones, by backward passes through backward passes."""
    params = list(trained(model).values())
    loss = model(input_ids=IDS, labels=IDS).loss
    first = torch.autograd.grad(loss, params, create_graph=True)
    return torch.autograd.grad(sum(g.sum() for g in first), params)


def test_second_derivatives_of_fast_paths_are_refused_and_plain_ones_are_right() -> None:
    model = llama()
    for seen in (nullcontext(), torch.device("cpu")):  # called at once, and as a custom operator
        with seen, pytest.raises(UsageError, match=r"second derivative.*with inlay\.plain\(\):"):
            product(model)
    with inlay.plain():
        found = product(model)
    params = trained(model)

    def along(point: Any) -> Any:
        return grad(lambda p: loss_of(model, p, IDS))(point)

    ones = {name: torch.ones_like(p) for name, p in params.items()}
    _, wanted = jvp(along, (params,), (ones,))
    for one, name in zip(found, params, strict=True):
        torch.testing.assert_close(one, wanted[name], atol=1e-4, rtol=1e-3)


def test_a_hessian_by_backward_passes_is_refused_too() -> None:
    model = net()
    with pytest.raises(UsageError, match="'low_rank_linear' has no second derivative"):
        hessian(lambda x: model(x).pow(2).sum(), X[:1])


# Layers that stand in the way.


class Switchable(nn.Linear):
    """A layer with attributes of its own under names that adapters need."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.active = True
        self.base = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.base if self.active else x


class WithAdapters(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)
        self.adapters = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapters(x)


@pytest.mark.parametrize(("layer", "name"), [(Switchable, "active"), (WithAdapters, "adapters")])
def test_a_layer_that_needs_our_names_itself_is_refused_and_left(layer: Any, name: str) -> None:
    model = Net()
    model.second = layer()
    before = model(X)
    with pytest.raises(inlay.errors.AdapterError, match=f"has an attribute '{name}' of its own"):
        inlay.attach(model, inlay.LoRA(rank=2), targets=["first", "second"])
    assert torch.equal(model(X), before)
    assert type(model.first) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "pruned"])
def test_a_weight_that_a_hook_computes_is_adapted_and_not_merged(way: str) -> None:
    torch.manual_seed(0)
    made: dict[str, Callable[[nn.Module], Any]] = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    }
    undone: dict[str, Callable[[nn.Module], Any]] = {
        "weight_norm": nn.utils.remove_weight_norm,
        "spectral_norm": nn.utils.remove_spectral_norm,
        "pruned": lambda layer: prune.remove(layer, "weight"),
    }
    model = Net().eval()
    made[way](model.second)
    before = model(X).detach()
    plain = model.second.weight.detach().clone()
    moved(inlay.attach(model, inlay.LoRA(rank=2), targets=["second"]))
    p = model.second.adapters["default"]
    hidden = torch.tanh(model.first(X))
    wanted = hidden @ (plain + inlay.LoRA(rank=2).scale * p.B @ p.A).T + model.second.bias
    torch.testing.assert_close(model.second(hidden), wanted, atol=1e-5, rtol=1e-4)
    tuned = model(X).detach()
    with pytest.raises(inlay.errors.MergeError, match="weight of second is computed from other"):
        inlay.merge(model, inputs=[{"x": X}])
    torch.testing.assert_close(model(X), tuned, atol=0, rtol=0)
    inlay.detach(model)
    torch.testing.assert_close(model(X), before, atol=1e-6, rtol=1e-5)
    undone[way](model.second)
    twin = copy.deepcopy(model)
    moved(inlay.attach(twin, inlay.LoRA(rank=2), targets=["second"]))
    tuned = twin(X).detach()
    inlay.merge(twin, inputs=[{"x": X}])
    torch.testing.assert_close(twin(X), tuned, atol=1e-5, rtol=1e-4)
