"""The laws that hold on a whole model, over every method x storage on tiny real architectures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from law_cases import (
    IDS,
    METHODS,
    PLAIN,
    STORED,
    Storage,
    built,
    far,
    logits,
    matched_count,
    model_cases,
    randomise_adapter,
    seeded,
)
from torch import Tensor, nn

from inlay.errors import AdapterError, MergeError
from inlay.methods.base import (
    HiddenMethod,
    Params,
    PromptMethod,
    SelectMethod,
    WeightMethod,
)
from inlay.model.adapters.attach import attach, detach, disabled, use
from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.adapters.registry import adapter_places, adapters
from inlay.model.adapters.report import report
from inlay.model.merge.merge import merge

CASES = model_cases()
every_case = pytest.mark.parametrize(
    ("method", "model", "storage"), CASES, ids=["/".join(case) for case in CASES]
)
on_llama = pytest.mark.parametrize(
    "method", sorted({m for m, model, s in CASES if (model, s) == ("llama", "fp32")})
)
FP64 = Storage("dense", torch.float64)


def attached(method: str, model: str, storage: str | Storage = "fp32", **more: Any) -> Any:
    """A tiny model with one randomised adapter."""
    made = attach(built(model, storage), METHODS[method], **more)
    randomise_adapter(made, more.get("name", "default"))
    return made


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that detaching must bring back."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": len(model._forward_pre_hooks),
    }


@every_case
def test_starts_as_the_base(method: str, model: str, storage: str) -> None:
    made = built(model, storage)
    before = logits(made)
    attach(made, METHODS[method])
    if isinstance(METHODS[method], PromptMethod):
        assert far(logits(made), before) > 1e-3
    else:
        assert far(logits(made), before) < STORED[storage].tolerance


@every_case
def test_merged_is_the_adapted(method: str, model: str, storage: str) -> None:
    made = attached(method, model, storage)
    adapted = logits(made)
    if not METHODS[method].mergeable:
        with pytest.raises(MergeError, match="no weight can hold"):
            merge(made)
        assert torch.equal(logits(made), adapted)
        return
    found = merge(made)
    assert found.surviving_fraction > 0.9
    assert not any(isinstance(m, AdaptedLayer | Params) for m in made.modules())
    assert far(logits(made), adapted) < 3 * STORED[storage].tolerance
    assert far(logits(made), logits(built(model, storage))) > 1e-3


@every_case
def test_detach_restores_bit_for_bit(method: str, model: str, storage: str) -> None:
    made = built(model, storage)
    next(made.parameters()).requires_grad_(False)
    before, output = snapshot(made), logits(made)
    attach(made, METHODS[method])
    randomise_adapter(made)
    assert not torch.equal(logits(made), output)
    assert torch.equal(logits(detach(made)), output)
    after = snapshot(made)
    tensors = before.pop("tensors"), after.pop("tensors")
    assert before == after
    assert list(tensors[0]) == list(tensors[1])
    assert all(torch.equal(tensors[0][n], tensors[1][n]) for n in tensors[0])


@every_case
def test_only_the_adapter_gets_gradient(method: str, model: str, storage: str) -> None:
    made = attached(method, model, storage)
    made.train()
    made(input_ids=IDS).logits.float().square().sum().backward()
    own = {id(p) for _, params in adapter_places(made, "default") for p in params.parameters()}
    for name, p in made.named_parameters():
        assert (p.grad is not None) == (id(p) in own) == p.requires_grad, name
        assert id(p) not in own or bool(torch.isfinite(p.grad).all() and p.grad.any()), name


@every_case
def test_counts_in_closed_form(method: str, model: str, storage: str) -> None:
    made = attached(method, model, storage)
    how, found = METHODS[method], adapters(made)["default"].found
    counted = report(made).trainable
    if isinstance(how, PromptMethod):
        assert counted == how.count_for(made.config)
    elif isinstance(how, SelectMethod):
        own = [(m, n, p) for m in built(model, storage).modules() for n, p in m._parameters.items()]
        chosen = {id(p): p.numel() for m, n, p in own if p is not None and how.selects(m, n)}
        assert counted == sum(chosen.values())
    else:
        assert isinstance(how, WeightMethod | HiddenMethod)
        assert counted == matched_count(detach(made), how, found.names)
    assert counted > 0


@every_case
def test_keeps_dtype_and_device(method: str, model: str, storage: str) -> None:
    made = built(model, storage)
    before = {n: (t.dtype, t.device) for n, t in made.state_dict().items()}
    output = logits(made).dtype
    attach(made, METHODS[method])
    assert logits(made).dtype == output
    after = made.state_dict()
    assert all((after[n].dtype, after[n].device) == before[n] for n in before)
    for _, params in adapter_places(made, "default"):
        assert {t.dtype for t in params.parameters()} == {torch.float32}


@every_case
def test_two_adapters_leave_each_other_alone(method: str, model: str, storage: str) -> None:
    one = attached(method, model, storage, name="one")
    alone = logits(one)
    attach(one, METHODS[method], name="two", seed=1)
    randomise_adapter(one, "two", scale=0.2)
    assert torch.equal(logits(one), alone)
    second = attach(built(model, storage), METHODS[method], name="two", seed=1)
    randomise_adapter(second, "two", scale=0.2)
    assert torch.equal(logits(use(one, "two")), logits(second))
    assert torch.equal(logits(use(one, "one")), alone)
    base = logits(built(model, storage))
    with disabled(one):
        with disabled(one):
            assert torch.equal(logits(one), base)
        assert torch.equal(logits(one), base)
    assert torch.equal(logits(one), alone)
    assert torch.equal(logits(detach(one, "two")), alone)


@on_llama
def test_use_trains_only_what_is_used(method: str) -> None:
    model = attached(method, "llama", name="one")
    attach(model, METHODS[method], name="two")
    use(model, "two")
    for name, wanted in (("one", False), ("two", True)):
        places = [params for _, params in adapter_places(model, name)]
        assert {p.requires_grad for params in places for p in params.parameters()} == {wanted}


@pytest.mark.parametrize("method", [n for n, m in PLAIN.items() if not isinstance(m, WeightMethod)])
def test_gradient_is_the_numerical_one(method: str) -> None:
    """Weight methods are held against dense autograd, layer by layer, in test_layer_laws."""
    model = attached(method, "gpt2", FP64)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float64}
    loss = model(input_ids=IDS).logits.square().mean()
    found = torch.autograd.grad(loss, trained)
    along = [
        torch.randn(p.shape, generator=seeded(i), dtype=p.dtype) for i, p in enumerate(trained)
    ]
    slope = sum(float((g * d).sum()) for g, d in zip(found, along, strict=True))
    assert slope == pytest.approx(difference(model, trained, along), rel=1e-6)


def difference(model: Any, trained: list[Tensor], along: list[Tensor], step: float = 1e-6) -> float:
    """The central difference of the loss along a direction."""

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, d in zip(trained, along, strict=True):
                p += by * d
            return float(model(input_ids=IDS).logits.square().mean())

    up, down = moved(step), moved(-2 * step)
    moved(step)
    return (up - down) / (2 * step)


@on_llama
def test_copies_and_state_dicts(method: str) -> None:
    model = attached(method, "llama")
    wanted = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), wanted)
    names = [n for n, _ in built("llama").named_parameters()]
    assert set(names) <= {n for n, _ in model.named_parameters()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    randomise_adapter(model, scale=0.3)
    assert not torch.equal(logits(model), wanted)
    assert torch.equal(logits(twin), wanted)
    model.load_state_dict(state)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(detach(twin)), logits(built("llama")))


@on_llama
def test_generates_as_it_computes(method: str) -> None:
    """Greedy generation with the cache equals greedy choice by whole forward passes."""
    model = attached(method, "llama")
    made = model.generate(
        input_ids=IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    ids = IDS[:1]
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


@pytest.mark.parametrize("method", [n for n, m in PLAIN.items() if isinstance(m, WeightMethod)])
def test_stacked_adapters_compose(method: str) -> None:
    """With two active, the second acts on the weight that the first has made."""
    model = attached(method, "llama", name="one")
    attach(model, METHODS["lora"], name="two", seed=1)
    randomise_adapter(model, "two")
    stacked = logits(use(model, "one", "two"))
    base = built("llama")
    merge(attach_same(base, method, model, "one"))
    merge(attach_same(base, "lora", model, "two"))
    assert far(stacked, logits(base)) < 1e-4
    assert far(stacked, logits(use(model, "one"))) > 1e-3
    merge(use(model, "one", "two"))
    assert far(logits(model), stacked) < 1e-4


def attach_same(base: Any, method: str, other: nn.Module, name: str) -> Any:
    """Attach a method with the tensors that another model's adapter has."""
    attach(base, METHODS[method], name=name)
    theirs = dict(adapter_places(other, name))
    for module_name, params in adapter_places(base, name):
        params.load_state_dict(theirs[module_name].state_dict())
    return base


@pytest.mark.parametrize("method", [n for n, m in PLAIN.items() if getattr(m, "reads_base", False)])
def test_what_reads_the_base_comes_first(method: str) -> None:
    model = attached("lora", "llama", name="one")
    attach(model, METHODS[method], name="two")
    alone = logits(model)
    with pytest.raises(AdapterError, match="must come first"):
        use(model, "one", "two")
    assert torch.equal(logits(model), alone)
    use(model, "two", "one")
