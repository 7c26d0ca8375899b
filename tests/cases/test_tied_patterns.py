"""Ties that a class declares by patterns are the base's own, whatever adapters are called."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay


class SharesByPattern(LlamaForCausalLM):
    """The second block's MLP is the first's, and the pattern matches all that lies in it."""

    _tied_weights_keys = {
        r"model\.layers\.1\.mlp\..*": r"model\.layers\.0\.mlp\..*",
        "lm_head.weight": "model.embed_tokens.weight",
    }  # fmt: skip


def made() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return SharesByPattern(config).eval()


def test_adapters_are_not_tied_and_the_base_is() -> None:
    model = inlay.attach(made(), inlay.LoRA(rank=2), targets=["up_proj"], layers="1")
    other = inlay.attach(made(), inlay.LoRA(rank=2), targets=["up_proj"])
    with torch.no_grad():
        for p in [p for p in other.parameters() if p.requires_grad]:
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
        other.model.layers[1].mlp.up_proj.adapters["default"].B.mul_(2)
    for each in (model, other):
        each.tie_weights()
        first, second = (layer.mlp for layer in each.model.layers)
        assert second.gate_proj.weight is first.gate_proj.weight
    first, second = (layer.mlp.up_proj.adapters["default"] for layer in other.model.layers)
    assert second.B is not first.B
    assert not torch.equal(second.B, first.B)


def test_such_a_model_merges() -> None:
    model = inlay.attach(made(), inlay.LoRA(rank=2), targets=["q_proj"])
    with torch.no_grad():
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.normal_(std=0.3)
    ids = torch.arange(8)[None]
    wanted = model(ids).logits
    inlay.merge(model)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
