"""What is handed to an engine that wants plain weights is the adapted model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.errors import MergeError
from inlay.methods.base import Method
from inlay.model.attach import adapter_places
from inlay.model.merged_weights import merged_weights

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
    torch.manual_seed(1)
    for _, params in adapter_places(model, "default"):
        for parameter in params.parameters():
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model.eval()


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
