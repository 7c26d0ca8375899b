"""Under autocast every method on every storage gives what it gives without, to autocast's rounding.

The measure is what the plain way loses to the same autocast: a fast path may not lose more.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from law_cases import (
    IDS,
    METHODS,
    STORED,
    attach,
    built,
    logits,
    model_cases,
    placed,
    randomise_adapter,
)
from torch import Tensor, nn

import inlay
from inlay.kernels import opaque
from inlay.kernels.frozen import frozen_linear
from inlay.kernels.low_rank import low_rank_linear
from inlay.kernels.switches import plain

HALVES = (torch.bfloat16, torch.float16)
LABELS = {"bert": torch.tensor([0, 2])}
MASKED = IDS.where(torch.arange(IDS.shape[1]) > 2, -100)


def adapted(method: str, model: str, storage: str) -> Any:
    made = built(model, storage)
    attach(made, METHODS[method])
    randomise_adapter(made)
    return made.train()


def step(model: Any, labels: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The logits and the gradient of all that trains, each as one vector in fp64."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
        output = model(input_ids=IDS, labels=labels)
        found = output.logits.detach().double().flatten()
    output.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in trained)
    return found, torch.cat([p.grad.double().flatten() for p in trained])


def lost(x: Tensor, exact: Tensor) -> float:
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm())


def assert_loses_no_more(model: Any, labels: Tensor, dtype: torch.dtype) -> None:
    exact = step(model, labels, None)
    fast = step(model, labels, dtype)
    with plain():
        slow = step(model, labels, dtype)
    room = 4 * torch.finfo(dtype).eps  # what one rounding more, or another order, may add
    for ours, theirs, wanted in zip(fast, slow, exact, strict=True):
        assert lost(ours, wanted) < 1.5 * lost(theirs, wanted) + room
        assert lost(theirs, wanted) < 0.1


@pytest.mark.parametrize(("method", "model", "storage"), model_cases())
def test_a_step_loses_no_more_than_the_plain_way(method: str, model: str, storage: str) -> None:
    made = adapted(method, model, storage)
    which = (len(method) + len(storage) + len(model)) % 2
    assert_loses_no_more(made, LABELS.get(model, MASKED), HALVES[which])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_checkpointed_step_is_the_same_step(storage: str, reentrant: bool) -> None:
    model = adapted("lora", "llama", storage)
    wanted = step(model, MASKED, torch.bfloat16)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = step(model, MASKED, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_autocast_in_a_checkpointed_function() -> None:
    model = adapted("lora", "llama", "fp32")
    embeds = model.get_input_embeddings()(IDS).requires_grad_()

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(inputs_embeds=x, use_cache=False).logits.float()

    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(inside(embeds).logsumexp(-1).sum(), trained)
    again = torch.utils.checkpoint.checkpoint(inside, embeds, use_reentrant=False)
    got = torch.autograd.grad(again.logsumexp(-1).sum(), trained)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_backward_pass_inside_autocast_is_one_outside() -> None:
    model = adapted("lora", "llama", "nf4")
    trained = [p for p in model.parameters() if p.requires_grad]
    embeds = model.get_input_embeddings()(IDS)
    found: list[tuple[Tensor, ...]] = []
    for dtype in HALVES:  # the backward pass is in the dtypes of the forward pass
        y = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        with torch.autocast("cpu", dtype=dtype):
            found.append(torch.autograd.grad(y.square().sum(), trained))
    y = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    exact = torch.autograd.grad(y.square().sum(), trained)
    for grads in found:
        assert all(lost(a, b) < 0.02 for a, b in zip(grads, exact, strict=True))


def test_generation_in_evaluation() -> None:
    model = adapted("lora", "llama", "nf4").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert logits(model).dtype == torch.bfloat16
    assert ids.shape == (2, IDS.shape[1] + 4)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_inputs_are_lowered_and_gradients_come_back(
    dtype: torch.dtype, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, base, x = placed("lora", STORED["nf4"], "linear", "layers.0.k_proj")
    packed = base.packed()
    assert packed is not None
    if traced:
        monkeypatch.setattr(opaque, "traced", lambda args: True)
    x = x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = frozen_linear(x, *packed)
    by_hand = frozen_linear(x.to(dtype), *packed)
    assert y.dtype == dtype
    assert torch.equal(y, by_hand)
    (to_x,) = torch.autograd.grad(y.float().square().sum(), x)
    (wanted,) = torch.autograd.grad(by_hand.float().square().sum(), x)
    assert to_x.dtype == torch.float32
    assert torch.equal(to_x, wanted)


def test_fp64_is_left_alone_and_autocast_can_be_off() -> None:
    held = ([torch.eye(4)], "dense", 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen_linear(torch.ones(2, 4, dtype=torch.float64), *held).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert frozen_linear(torch.ones(2, 4), *held).dtype == torch.float32


def test_compiles_whole_under_autocast() -> None:
    torch._dynamo.reset()
    layer = nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 40)).requires_grad_(False)
    inlay.quantize(layer, "nf4", skip=("1",))
    inlay.attach(layer, inlay.LoRA(rank=4))
    randomise_adapter(layer)
    x = torch.randn(5, 40)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    wanted = inside(x)
    got = torch.compile(inside, fullgraph=True, backend="aot_eager")(x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert lost(got, wanted) < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert lost(got, wanted) < 0.02


def test_no_autocast_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("nothing is to be cast")

    monkeypatch.setattr(opaque, "lowered", refuse)
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    low_rank_linear(torch.randn(3, 4), a, b, None, 1.0, [torch.eye(4)], "dense", 4, 4)
