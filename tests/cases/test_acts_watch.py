"""The first passes show whether every adapted place acts."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SqueezeBertConfig,
    SqueezeBertForTokenClassification,
)

import inlay
from inlay.model.adapters.watch import PASSED_BY, InertAdapterWarning

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A layer that is called, one whose weight is read, one thrown away, one passed by, a list."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "read", "thrown", "passed"):
            setattr(self, name, nn.Linear(8, 8))
        self.chosen = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.thrown(x)
        x = self.called(x)
        x = x + F.linear(x, self.read.weight, self.read.bias)
        return self.chosen[0](x)


def net(*targets: str) -> nn.Module:
    torch.manual_seed(0)
    return inlay.attach(Net(), inlay.LoRA(rank=2), targets=targets or "all-linear")


def watched(model: nn.Module) -> bool:
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks) if h]
    return bool(hooks) or any("watch" in vars(m) for m in model.modules())


def test_a_place_that_is_passed_by_is_named_at_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with caplog.at_level(logging.INFO), pytest.warns(InertAdapterWarning) as said, torch.no_grad():
        model(X)
    assert len(said) == 1
    assert "'passed' (1)" in str(said[0].message)
    assert "thrown" not in str(said[0].message)
    assert "not reached by the first input: the adapter at 'chosen.*' (2)" in caplog.text
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(X)


def test_an_output_that_is_thrown_away_stops_training() -> None:
    with pytest.raises(inlay.TrainingError, match=r"no gradient reaches the adapter at 'thrown'"):
        net("called", "thrown")(X).sum().backward()


def test_a_place_that_is_passed_by_again_and_again_stops_training() -> None:
    model = net("called", "passed")
    with pytest.warns(InertAdapterWarning):
        model(X).sum().backward()
    for _ in range(PASSED_BY - 2):
        model(X).sum().backward()
    with pytest.raises(inlay.TrainingError, match="'passed'"):
        model(X).sum().backward()


def test_a_branch_of_some_inputs_trains() -> None:
    model = net("called", "chosen.1", "chosen.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PASSED_BY + 2):
            model(X).sum().backward()
    assert not watched(model)


def test_nothing_is_watched_once_all_is_proven() -> None:
    model = net("called", "read", "chosen.0")
    assert watched(model)
    twin = copy.deepcopy(model)
    model(X).sum().backward()
    assert not watched(model)
    assert watched(twin)
    assert not any(p._backward_hooks for p in model.parameters())
    inlay.detach(twin)
    assert not watched(twin)


def test_the_gradient_of_several_losses_is_judged_together() -> None:
    model = net("called", "passed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = model(X)
        other = model.passed(X)  # type: ignore[operator]
    y.sum().backward(retain_graph=True)
    other.sum().backward()
    assert not watched(model)


class Dropping(nn.Module):
    """Blocks that are left out as a whole, and one that is always there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.keep = {0}

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x) if i in self.keep else x
        return x


def test_blocks_left_out_as_a_whole_are_no_fault() -> None:
    model = inlay.attach(Dropping(), inlay.LoRA(rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X).sum().backward()
        model.keep = {0, 1}  # type: ignore[assignment]
        model(X).sum().backward()
    assert not watched(model)


def test_a_hidden_method_past_forward_is_named() -> None:
    """What follows a layer's output cannot act where only its weight is read."""
    model = inlay.attach(Net(), inlay.Bottleneck(), targets=["called", "read"])
    with pytest.warns(InertAdapterWarning, match="'read'"), torch.no_grad():
        model(X)


def test_a_loss_that_depends_on_nothing_that_trains_stops_training() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SqueezeBertConfig(
        vocab_size=64, intermediate_size=32, embedding_size=32, max_position_embeddings=32,
        q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1, intermediate_groups=1,
        output_groups=1, **sizes,
    )  # fmt: skip
    model = inlay.attach(
        SqueezeBertForTokenClassification(config), inlay.LoRA(rank=2), targets="all-linear"
    )
    ids = torch.ones(2, 6, dtype=torch.long)
    model.eval()(input_ids=ids, labels=ids % 2)  # which need not train
    with pytest.raises(inlay.TrainingError, match="SqueezeBertForTokenClassification depends on"):
        model.train()(input_ids=ids, labels=ids % 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_are_computed_again_train(reentrant: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = inlay.attach(LlamaForCausalLM(config), inlay.LoRA(rank=2), targets=["q_proj", "v_proj"])
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids = torch.arange(12).view(2, 6)
    for _ in range(PASSED_BY + 2):
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not watched_places(model)


def watched_places(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if "watch" in vars(m)]


def test_what_a_backward_pass_of_parts_does_not_reach_stops_the_next_step() -> None:
    model = net("called", "thrown")
    called = model.called
    run = called.forward
    called.forward = lambda x: checkpoint(run, x, use_reentrant=True)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    with pytest.raises(inlay.TrainingError, match="'thrown'"):
        model(x)
