"""A prompt under gradient checkpointing: the loss and gradients without it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import inlay
from inlay.memory.policy import apply

pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "its body drops the cache": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
        )
    ),
    "windows": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=10, sliding_window=4)
    ),
    "classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL)),
}  # fmt: skip
METHODS = {
    "prefix": inlay.PrefixTuning(tokens=3),
    "prompt": inlay.PromptTuning(tokens=3),
    "p-tuning": inlay.PTuning(tokens=3),
}
IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_put((torch.tensor([0]), torch.tensor([7])), torch.tensor(0))


def built(model: str, method: str) -> Any:
    torch.manual_seed(0)
    return inlay.attach(MODELS[model](), METHODS[method]).train()


def step(model: Any) -> list[Tensor]:
    """The loss and every gradient."""
    labels = torch.tensor([0, 1]) if hasattr(model, "score") else IDS
    loss = model(input_ids=IDS, attention_mask=MASK, labels=labels).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("policy", ["layer-inputs", "recompute-mlp", "transformers' own"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_which_keeps_everything(name: str, method: str, policy: Any) -> None:
    kept, again = built(name, method), built(name, method)
    if policy == "transformers' own":
        again.gradient_checkpointing_enable()
    else:
        apply(again, policy)
    runs = 0

    def counted(*_: object) -> None:
        nonlocal runs
        runs += 1

    again.get_submodule(
        "transformer.h.1.mlp" if "body" in name else "model.layers.1.mlp"
    ).register_forward_pre_hook(counted)
    expected = step(kept)
    for _ in range(2):
        again.zero_grad()
        runs = 0
        assert all(torch.equal(x, y) for x, y in zip(step(again), expected, strict=True))
        assert runs == 2 + (method != "prefix"), "forward, backward, and for the virtual tokens"
    assert again.is_gradient_checkpointing


def test_generation_and_a_cache_that_is_given() -> None:
    model = built("llama", "p-tuning")
    wanted = model.eval().generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False), wanted)
    with torch.no_grad():
        cache = model.eval()(input_ids=IDS[:, :4], use_cache=True)
    held = next(value for value in cache.values() if isinstance(value, DynamicCache))
    with pytest.raises(inlay.AdapterError, match="leave the cache out"):
        model.train()(input_ids=IDS[:, 4:], past_key_values=held)
    step(model)
