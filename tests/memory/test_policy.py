"""Activation policies: the same gradients, less memory, and nothing below the lowest adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.errors import ModelError
from inlay.memory.policy import POLICIES, Policy, applied, apply, wide_outputs

EXACT: tuple[Policy, ...] = ("keep-products", "recompute-mlp", "layer-inputs")


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


METHODS = {
    "lora": inlay.LoRA(rank=4, dropout=0.1),
    "dora": inlay.DoRA(rank=4),
    "ia3": inlay.IA3(),
    "bottleneck": inlay.Bottleneck(),
}


def gradients(model: Any, policy: Policy) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    with applied(model, policy):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("method", list(METHODS))
def test_gradients_are_those_of_keep_all(method: str, storage: str, policy: Policy) -> None:
    model = llama()
    inlay.quantize(model, storage)
    inlay.attach(model, METHODS[method])
    expected = gradients(model, "keep-all")
    found = gradients(model, policy)
    assert expected
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("policy", EXACT)
def test_gradients_with_conv1d_layers(policy: Policy) -> None:
    model = gpt2()
    inlay.attach(model, inlay.LoRA(rank=4))
    expected, found = gradients(model, "keep-all"), gradients(model, policy)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_offloaded_inputs_give_the_same_gradients_and_are_all_that_is_moved() -> None:
    model = llama()
    inlay.attach(model, inlay.LoRA(rank=4, dropout=0.1))
    expected = gradients(model, "keep-all")
    moved: list[tuple[int, ...]] = []

    def away(x: torch.Tensor) -> torch.Tensor:
        moved.append(tuple(x.shape))
        return x.clone()

    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    apply(model, "offload", to_host=away, back=lambda x: x)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    apply(model, "keep-all")
    assert moved.count((2, 16, 32)) == 3
    for name, p in model.named_parameters():
        if name in expected:
            assert torch.equal(p.grad, expected[name]), name


def test_offload_is_refused_on_a_cpu() -> None:
    with pytest.raises(ModelError, match=r"on the CPU; 'layer-inputs' is"):
        apply(llama(), "offload")


def test_a_model_that_cannot_compute_again_is_refused_all_but_keep_all() -> None:
    layer = torch.nn.Linear(4, 4)
    apply(layer, "keep-all")
    with pytest.raises(ModelError, match="Linear cannot be computed again"):
        apply(layer, "layer-inputs")


def added_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward whose result is changed in place behind it."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = function(x)
        y += x.mean()
        return y

    return forward


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("changed", ["self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("adapted", [["q_proj", "up_proj"], "all-linear"])
def test_a_product_that_the_block_changes_in_place_is_not_kept(
    adapted: str | list[str], changed: str, policy: Policy
) -> None:
    model = llama()
    inlay.attach(model, inlay.LoRA(rank=4, dropout=0.1), targets=adapted)
    for block in model.model.layers:
        layer = block.get_submodule(changed)
        layer.forward = added_in_place(layer.forward)
    expected = gradients(model, "keep-all")
    found = gradients(model, policy)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def doubled(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    inputs[0].mul_(2)


def test_a_product_that_the_next_block_changes_in_place_is_not_kept() -> None:
    model = llama()
    inlay.attach(model, inlay.LoRA(rank=4))
    first = model.model.layers[0]
    last = torch.nn.Linear(32, 32, bias=False)
    run = first.forward
    first.forward = lambda *a, **k: last(run(*a, **k))
    model.model.layers[1].register_forward_pre_hook(doubled)
    expected = gradients(model, "keep-all")
    found = gradients(model, "keep-products")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_blocks_below_the_lowest_adapter_are_not_computed_again() -> None:
    model = llama()
    inlay.attach(model, inlay.LoRA(rank=4), layers="2")
    runs = [0, 0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda *_, index=index: runs.__setitem__(index, runs[index] + 1)
        )
    gradients(model, "layer-inputs")
    assert runs == [1, 1, 2]


def test_the_wide_products_are_the_mlps() -> None:
    assert wide_outputs(llama()) == {80}
    assert wide_outputs(gpt2()) == {128}


def test_policies_go_from_the_most_memory_to_the_least() -> None:
    assert POLICIES[0] == "keep-all"
    assert POLICIES[-1] == "offload"
