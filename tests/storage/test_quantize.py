"""Quantising a model in memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from inlay.errors import ModelError, StorageError
from inlay.model.load.quantize import describe_quantization, quantize
from inlay.storage.int8 import Int8Linear
from inlay.storage.nf4 import NF4Linear


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 40, "intermediate_size": 98, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **changes})).eval()


def packed(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, NF4Linear | Int8Linear)]


@pytest.mark.parametrize(("storage", "limit"), [("nf4", 0.15), ("int8", 0.02)])
def test_llama_close_to_dense(storage: str, limit: float) -> None:
    model = llama()
    ids = torch.arange(20).view(2, 10)
    before = model(ids).logits
    assert quantize(model, storage) is model
    assert len(packed(model)) == 14
    assert type(model.lm_head) is nn.Linear
    after = model(ids).logits
    assert 0 < (after - before).norm() / before.norm() < limit


def test_conv1d_is_transposed() -> None:
    config = GPT2Config(
        n_embd=36, n_layer=1, n_head=2, vocab_size=50, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    ids = torch.arange(10).unsqueeze(0)
    before = model(ids).logits
    quantize(model, "int8")
    assert packed(model) == [
        "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj",
    ]  # fmt: skip
    assert (model(ids).logits - before).norm() / before.norm() < 0.02


def test_tied_weights_stay_dense() -> None:
    model = llama(tie_word_embeddings=True)
    quantize(model, skip=())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shared = nn.Linear(8, 8)
    twin = nn.Linear(8, 8)
    twin.weight = shared.weight
    stack = quantize(nn.Sequential(shared, twin, nn.Linear(8, 4)))
    assert packed(stack) == ["2"]
    assert stack[0].weight is stack[1].weight


def test_skip_by_name_and_suffix() -> None:
    model = quantize(llama(), skip=("q_proj", "model.layers.1.mlp.up_proj"))
    assert "lm_head" in packed(model)
    assert not [n for n in packed(model) if n.endswith("q_proj")]
    assert "model.layers.0.mlp.up_proj" in packed(model)
    assert "model.layers.1.mlp.up_proj" not in packed(model)
    with pytest.raises(ModelError, match=r"skip 'q_poj' matches no linear layer.*'q_proj'"):
        quantize(llama(), skip=("q_poj",))


def test_dense_weights_are_freed_and_modes_kept() -> None:
    model = llama().train()
    gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    quantize(model)
    gc.collect()
    assert gone() is None
    assert model.model.layers[0].mlp.up_proj.training
    assert not any(
        p.requires_grad for n in packed(model) for p in model.get_submodule(n).parameters()
    )


def test_a_single_layer_and_a_plain_module() -> None:
    assert isinstance(quantize(nn.Linear(5, 3)), NF4Linear)
    stack = quantize(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 7)), "int8")
    assert packed(stack) == ["0", "2"]
    assert quantize(nn.ReLU(), "dense").__class__ is nn.ReLU


def test_what_cannot_be_quantised_is_said() -> None:
    with pytest.raises(StorageError, match="Did you mean 'int8'"):
        quantize(llama(), "int9")
    with pytest.raises(ModelError, match="ReLU has no linear layer"):
        quantize(nn.ReLU())
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(
        StorageError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds a NaN"
    ):
        quantize(model)


def test_the_configuration_says_how_the_layers_are_held() -> None:
    model = quantize(llama(), double_quant=False)
    said = model.config.quantization_config
    assert (said["load_in_4bit"], said["bnb_4bit_use_double_quant"]) == (True, False)
    assert said["llm_int8_skip_modules"] == ["lm_head"]
    for name in packed(model):
        model.set_submodule(name, nn.Linear(1, 1))
    describe_quantization(model)
    assert "quantization_config" not in vars(model.config)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_what_a_model_keeps_in_full_precision_stays_dense(storage: str) -> None:
    """T5 casts to the dtype of `wo`, which of a packed weight is that of bytes."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=61, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.arange(8).view(2, 4)
    before = model(input_ids=ids, labels=ids).logits
    quantize(model, storage)
    assert packed(model)
    assert not [name for name in packed(model) if name.endswith(".wo")]
    after = model(input_ids=ids, labels=ids).logits
    assert (after - before).norm() / before.norm() < 0.2
