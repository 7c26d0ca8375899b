"""What is handed to an engine that wants plain weights is the adapted model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.errors import MergeError
from inlay.methods.base import Method
from inlay.model.adapters.registry import adapter_places
from inlay.model.merge.weights import merged_weights
from inlay.model.stream.host import embedding_on_host

IDS = torch.tensor([[1, 5, 9, 2, 7, 30]])


def plain(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, attention_bias=True, tie_word_embeddings=tied,
            initializer_range=0.1,
        )
    ).eval()  # fmt: skip


def adapted(method: Method, storage: str | None, tied: bool, **options: Any) -> Any:
    model: Any = plain(tied)
    model = inlay.quantize(model, storage) if storage else model
    inlay.attach(model, method, **options)
    return moved(model).eval()


def moved(model: Any) -> Any:
    """The model, its adapter away from where it started."""
    torch.manual_seed(1)
    for _, params in adapter_places(model, "default"):
        for parameter in params.parameters():
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("storage", [None, "nf4", "int8"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (inlay.LoRA(rank=2), {}),
        (inlay.LoRA(rank=2), {"targets": ["q_proj", "lm_head"]}),
        (inlay.DoRA(rank=2), {"targets": ["up_proj"]}),
        (inlay.IA3(), {}),
        (inlay.NormTuning(), {}),
        (inlay.LoRA(rank=2), {"modules_to_save": ["embed_tokens"]}),
    ],
    ids=["lora", "head", "dora", "ia3", "norms", "embeddings"],
)
def test_a_plain_model_with_these_weights_is_the_adapted_one(
    method: Method, options: dict[str, Any], storage: str | None, tied: bool
) -> None:
    if tied and storage and "modules_to_save" in options:
        pytest.skip("a quantised head is not tied to what trains")
    model = adapted(method, storage, tied, **options)
    with torch.no_grad():
        wanted = model(IDS).logits
    other: Any = plain()
    found = dict(merged_weights(model))
    names = {name for name, _ in other.named_parameters()}
    if tied and "lm_head.weight" not in found:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    assert set(found) == names
    other.load_state_dict(found)
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, wanted, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(model(IDS).logits, wanted)


def test_what_cannot_merge_is_a_sentence() -> None:
    model = inlay.attach(plain(), inlay.PrefixTuning(tokens=2))
    with pytest.raises(MergeError, match="cannot merge"):
        next(merged_weights(model))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def packed_gpt2() -> Any:
    return inlay.quantize(gpt2(), "nf4")


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (gpt2, "all-linear"), (packed_gpt2, "c_attn"), (gpt2, ["wte", "c_proj"]),
        (plain, ["embed_tokens", "q_proj"]),
    ],
    ids=["conv1d", "packed-conv1d", "embedding-conv1d", "embedding"],
)  # fmt: skip
def test_weights_lie_as_the_plain_model_has_them(make: Any, targets: Any) -> None:
    model, other = make(), gpt2() if make is packed_gpt2 else make()
    inlay.attach(model, inlay.LoRA(rank=2), targets=targets)
    moved(model)
    with torch.no_grad():
        wanted = model(IDS).logits
        found = dict(merged_weights(model))
        other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.clone())  # tied no more
        other.load_state_dict(found, strict=False)
        torch.testing.assert_close(other(IDS).logits, wanted, atol=1e-3, rtol=1e-3)


def test_an_embedding_on_the_host_keeps_its_layout() -> None:
    model = embedding_on_host(plain(), "cpu")
    inlay.attach(model, inlay.LoRA(rank=2), targets=["q_proj"])
    own = plain().get_input_embeddings().weight
    assert torch.equal(dict(merged_weights(model))["model.embed_tokens.weight"], own)
