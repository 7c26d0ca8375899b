"""A key-value cache is read under any name: `past_key_values`, or `cache` since 5.24."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Cache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import inlay
from inlay.model.adapters.registry import adapter_places
from inlay.model.fast.attention import FastBackbone
from inlay.model.seams.transformers import CACHE_NAMES, cache_argument, cache_in

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "windows": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )
    ),
}  # fmt: skip
IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def built(name: str, method: Any = None) -> Any:
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[name]()
    inlay.attach(model, method or inlay.LoRA(rank=4))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for tensor in params.parameters():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def continued(model: Any, cut: int = 7) -> torch.Tensor:
    """The logits of the later tokens, over the cache of the first."""
    with torch.no_grad():
        cache = cache_in(model(input_ids=IDS[:, :cut], use_cache=True).values())
        assert isinstance(cache, Cache)
        name = cache_argument(type(model).forward)
        assert name is not None
        return model(input_ids=IDS[:, cut:], use_cache=True, **{name: cache}).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_rollout_in_training_is_that_in_evaluation(name: str) -> None:
    model = built(name)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    call = {"input_ids": IDS, "attention_mask": mask, "pad_token_id": 0, **GREEDY}
    wanted = model.eval().generate(**call)
    assert torch.equal(model.train().generate(**call), wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_second_piece_sees_the_first(name: str, training: bool) -> None:
    model = built(name).train(training)
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(continued(model), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", CACHE_NAMES[:2])
def test_a_cache_under_another_name_is_no_mask_to_ignore(given: str) -> None:
    """A decoder of somebody's own may call it anything."""
    model = built("llama").train()
    body: Any = model.model
    assert isinstance(body, FastBackbone)
    with torch.no_grad():
        cache = cache_in(body(input_ids=IDS[:, :7], use_cache=True).values())
        assert cache is not None
        assert body.rows({"input_ids": IDS[:, 7:], given: None}) is not None
        assert body.rows({"input_ids": IDS[:, 7:], given: cache}) is None
        assert body.rows({"input_ids": IDS[:, 7:], "unheard_of": cache}) is None
        assert body.rows({"input_ids": IDS[:, 7:], "unheard_of": torch.ones(1)}) is None


@pytest.mark.parametrize(
    "method", [inlay.PrefixTuning(tokens=3), inlay.PromptTuning(tokens=3), inlay.PTuning(tokens=3)]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_acts_and_generates(name: str, method: Any) -> None:
    model = built(name, method).eval()
    with torch.no_grad():
        prompted = model(input_ids=IDS, use_cache=False).logits
        with inlay.disabled(model):
            base = model(input_ids=IDS, use_cache=False).logits
    assert prompted.shape == base.shape
    assert float((prompted - base).abs().max()) > 1e-3
    cached = model.generate(input_ids=IDS, pad_token_id=0, **GREEDY)
    ids = IDS
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, ids)
    model.train()
    assert torch.equal(model.generate(input_ids=IDS, pad_token_id=0, **GREEDY), ids)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_model_is_packed_as_it_is_read(storage: str) -> None:
    model, _ = inlay.load("pocket", storage=storage, device="cpu")
    assert any(type(m).__name__.lower().startswith(storage) for m in model.modules())
    assert not hasattr(model, "hf_quantizer")
