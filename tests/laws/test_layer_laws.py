"""The laws that hold at one layer, over every weight method x storage x layer kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from law_cases import (
    LAYER_NAMES,
    LAYERS,
    ONE_LAYER,
    OWN,
    STORED,
    Storage,
    far,
    layer_cases,
    placed,
    randomise_adapter,
    seeded,
)
from torch import Tensor, nn

from inlay.methods.base import Params, WeightMethod
from inlay.model.adapters.attach import attach, detach, disabled
from inlay.model.adapters.places import view_at
from inlay.model.adapters.registry import adapter_tensors
from inlay.model.merge.merge import merge
from inlay.storage.base import FrozenLinear
from inlay.storage.own import ByWeight
from inlay.storage.registry import STORAGES, frozen

CASES = layer_cases()
IDS = ["/".join((m, s, k, n.rsplit(".", 1)[-1])) for m, s, k, n in CASES]
EXACT = [Storage("dense", torch.float64), *(Storage(s, torch.float64) for s in STORAGES)]
every_case = pytest.mark.parametrize(("method", "storage", "layer", "name"), CASES, ids=IDS)


def definition(here: WeightMethod, p: Params, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """What the method says the output is, with a dense weight."""
    if not x.is_floating_point():
        x = F.one_hot(x, w.shape[1]).to(w.dtype)
    return F.linear(x, here.weight(p, w), here.bias(p, b))


@every_case
def test_forward_is_the_weight(method: str, storage: str, layer: str, name: str) -> None:
    here, p, base, x = placed(method, STORED[storage], layer, name)
    wide = x.float() if x.is_floating_point() else x
    bias = None if base.bias is None else base.bias.float()
    wanted = definition(here, p, wide, base.dequantize().float(), bias)
    got = here.forward(p, x, base, False)
    assert got.dtype == base.dtype
    assert far(got, wanted) < STORED[storage].tolerance
    assert far(base.linear(x), wanted) > 2 * STORED[storage].tolerance


@every_case
def test_starts_as_a_no_op(method: str, storage: str, layer: str, name: str) -> None:
    here = ONE_LAYER[method].for_layer(name)
    assert isinstance(here, WeightMethod)
    base = frozen(STORED[storage].hold(LAYERS[layer].build()))
    p = here.init(base, LAYERS[layer].kind, seeded())
    x = LAYERS[layer].inputs(STORED[storage].dtype)
    assert far(here.forward(p, x, base, False), base.linear(x)) < STORED[storage].tolerance / 2


@every_case
def test_counts_in_closed_form(method: str, storage: str, layer: str, name: str) -> None:
    here, p, base, _ = placed(method, STORED[storage], layer, name)
    assert sum(q.numel() for q in p.parameters()) == here.count(base.shape)
    assert {q.dtype for q in p.parameters()} == {torch.float32}


@pytest.mark.parametrize("storage", EXACT, ids=lambda s: s.name)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ONE_LAYER)
@pytest.mark.parametrize("name", LAYER_NAMES)
def test_gradient_is_dense_autograd(method: str, storage: Storage, layer: str, name: str) -> None:
    kind = LAYERS[layer].kind
    if kind not in ONE_LAYER[method].kinds or (storage.packed and kind != "linear"):
        return
    here, p, base, x = placed(method, storage, layer, name)
    assert {q.dtype for q in p.parameters()} == {torch.float64}
    x.requires_grad_(x.is_floating_point())
    got = gradients(here.forward(p, x, base, True), p, x)
    wanted = gradients(definition(here, p, x, base.dequantize(), base.bias), p, x)
    for ours, dense in zip(got, wanted, strict=True):
        assert far(ours, dense) < 1e-9


def gradients(y: Tensor, p: Params, x: Tensor) -> list[Tensor]:
    """The gradients of a fixed random functional of y to every tensor and to x."""
    loss = (y * torch.randn(y.shape, generator=seeded(5), dtype=torch.float64)).sum()
    wrt = [*p.parameters(), *([x] if x.requires_grad else [])]
    return list(torch.autograd.grad(loss, wrt))


@pytest.mark.parametrize("storage", [s for s in STORED if STORED[s].packed])
@pytest.mark.parametrize("method", ONE_LAYER)
def test_backward_keeps_no_dense_weight(method: str, storage: str) -> None:
    here, p, base, x = placed(method, STORED[storage], "linear", LAYER_NAMES[0])
    x.requires_grad_()
    largest = largest_saved(here, p, base, x)
    assert 0 < largest < base.shape[0] * base.shape[1]


def largest_saved(here: WeightMethod, p: Params, base: FrozenLinear, x: Tensor) -> int:
    """The size of the largest floating-point tensor that one forward saves for backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        here.forward(p, x, base, True).sum().backward()
    return max(t.numel() for t in saved if t.is_floating_point())


class Pair(nn.Module):
    """Two layers in a row, by the names that methods tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(40, 48)
        self.down_proj = nn.Linear(48, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.k_proj(x)))


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("method", [n for n in ONE_LAYER if "=" not in n])
def test_compiles_whole(method: str, storage: str) -> None:
    assert_compiled_is_eager(method, storage, "aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    assert_compiled_is_eager("lora", "nf4", "inductor")


def assert_compiled_is_eager(method: str, storage: str, backend: str) -> None:
    """Compile two adapted layers without a graph break; compare output and gradients."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = STORED[storage].hold_model(Pair())
    attach(model, ONE_LAYER[method], targets=("k_proj", "down_proj"))
    randomise_adapter(model)
    x = torch.randn(5, 40, generator=seeded(1)).to(STORED[storage].dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    eager = model(x)
    wanted = torch.autograd.grad(eager.float().square().sum(), trained)
    compiled = torch.compile(model, fullgraph=True, backend=backend)(x)
    got = torch.autograd.grad(compiled.float().square().sum(), trained)
    for ours, dense in zip((compiled, *got), (eager, *wanted), strict=True):
        assert far(ours, dense) < 3 * STORED[storage].tolerance
    with disabled(model):
        assert far(model(x), eager) > 1e-3


def own_cases() -> list[tuple[str, str, str]]:
    """(method, layer, the layer's name) for layers that keep their own forward."""
    return [
        (method, layer, name)
        for method, built in ONE_LAYER.items()
        for layer in OWN
        for name in ("k_proj", "down_proj")
        if ("embedding" in built.kinds or layer != "scaled")
        and (name == "k_proj" or built.for_layer(name) != built.for_layer("k_proj"))
    ]


def targets_of(layer: str, name: str) -> str:
    return f"{name}.up" if layer.startswith("experts") else name


@pytest.mark.parametrize(("method", "layer", "name"), own_cases(), ids="/".join)
def test_a_layers_own_forward_runs_on_the_weight(method: str, layer: str, name: str) -> None:
    plain = nn.ModuleDict({name: OWN[layer].build()})
    model = nn.ModuleDict({name: OWN[layer].build()})
    x = OWN[layer].inputs()
    attach(model, ONE_LAYER[method], targets=targets_of(layer, name))
    assert far(model[name](x), plain[name](x)) < 1e-12
    randomise_adapter(model, scale=0.5)
    wanted = torch.func.functional_call(plain[name], defined(plain, model, name), (x,))
    got = model[name](x)
    assert far(got, plain[name](x)) > 1e-4
    assert far(got, wanted) < 1e-10
    with disabled(model):
        assert far(model[name](x), plain[name](x)) < 1e-12
    trained = [p for p in model.parameters() if p.requires_grad]
    drawn = torch.randn(got.shape, generator=seeded(5), dtype=torch.float64)
    ours = torch.autograd.grad((got * drawn).sum(), trained)
    dense = torch.autograd.grad((wanted * drawn).sum(), trained)
    assert all(far(a, b) < 1e-9 for a, b in zip(ours, dense, strict=True))


def defined(plain: nn.ModuleDict, model: nn.ModuleDict, name: str) -> dict[str, Tensor]:
    """The parameters that the methods define, by their names in the layer."""
    found: dict[str, Tensor] = {}
    for place, params, here, _ in adapter_tensors(model, "default"):
        assert isinstance(here, WeightMethod)
        view = view_at(plain, place)
        assert view is not None
        inside = place.removeprefix(name).strip(".")
        held = isinstance(view, ByWeight)
        parameter = view.parameter if held else "weight"
        w = here.weight(params, view.matrix())  # pyright: ignore
        stored = view.as_stored(w) if held else view.turned(w)
        key = parameter if inside in ("", parameter) else f"{inside}.{parameter}"
        found[key] = stored
        bias = here.bias(params, view.bias)
        if bias is not None:
            above = key.rpartition(".")[0]
            own = (view.bias_name if held else "bias") or "bias"
            found[f"{above}.{own}" if above else own] = bias
    assert found
    return found


@pytest.mark.parametrize("layer", OWN)
def test_a_layer_with_its_own_forward_merges_and_comes_back(layer: str) -> None:
    x = OWN[layer].inputs()
    model = nn.Sequential(OWN[layer].build())
    before = model(x)
    attach(model, ONE_LAYER["lora"], targets="0.up" if "experts" in layer else "0")
    randomise_adapter(model)
    wanted = model(x)
    key = "input"
    merge(model, inputs=[{key: x}])
    assert far(model(x), wanted) < 1e-7
    assert far(model(x), before) > 1e-4
    model = nn.Sequential(OWN[layer].build())
    attach(model, ONE_LAYER["lora"], targets="0.up" if "experts" in layer else "0")
    randomise_adapter(model)
    detach(model)
    assert far(model(x), before) < 1e-12
    assert type(model[0]) is type(OWN[layer].build())
