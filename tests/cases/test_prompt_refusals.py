"""A prompt is put on a model that runs with it, or refused at once, in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    ElectraConfig,
    ElectraModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import inlay

METHODS = [
    inlay.PrefixTuning(tokens=3),
    inlay.PrefixTuning(tokens=3, start="random"),
    inlay.PromptTuning(tokens=3),
    inlay.PTuning(tokens=3),
]
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
MLA: dict[str, Any] = {
    **SMALL, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
REFUSED: dict[str, Callable[[], Any]] = {
    "ViT": lambda: ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    ),
    "latent attention": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**MLA)),
    "a state space": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            **SMALL, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
            mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8,
        )
    ),
}  # fmt: skip
ENCODERS: dict[str, Callable[[], Any]] = {
    "T5's encoder": lambda: T5EncoderModel(T5Config(**T5, num_heads=4)),
    "DeBERTa": lambda: DebertaModel(DebertaConfig(**SMALL)),
}
"""What takes embeddings before its text, and no keys and values."""
TAKEN: dict[str, Callable[[], Any]] = {
    "a decoder made of RoBERTa": lambda: RobertaForCausalLM(
        RobertaConfig(**SMALL, is_decoder=True)
    ),
    "BERT": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "RoBERTa": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL)),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(**T5, num_heads=4, decoder_start_token_id=0, pad_token_id=0)
    ),
    "BART": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, pad_token_id=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48,
        )
    ),
    "windows and wide heads": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=10, sliding_window=4)
    ),
}  # fmt: skip
IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS, ids=["prefix", "random prefix", "prompt", "p-tuning"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_have_a_prompt_says_so_at_once(name: str, method: Any) -> None:
    torch.manual_seed(0)
    model = REFUSED[name]().eval()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(inlay.AdapterError, match="prompt methods"):
        inlay.attach(model, method)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    inlay.attach(model, inlay.LoRA(rank=2))


@pytest.mark.parametrize("method", METHODS, ids=["prefix", "random prefix", "prompt", "p-tuning"])
@pytest.mark.parametrize("name", TAKEN)
def test_a_model_that_has_one_runs_and_trains(name: str, method: Any) -> None:
    torch.manual_seed(0)
    model = TAKEN[name]()
    inlay.attach(model, method)
    labels = IDS[:, 0] % 2 if name == "BERT" else IDS
    model.train()(input_ids=IDS, labels=labels).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_without_a_cache_takes_embeddings_alone(name: str) -> None:
    torch.manual_seed(0)
    model = ENCODERS[name]().eval()
    for method in METHODS[:2]:
        with pytest.raises(inlay.AdapterError, match="cannot have prefix: it takes no key-value"):
            inlay.attach(model, method)
    inlay.attach(model, METHODS[2])
    assert model(input_ids=IDS).last_hidden_state.shape == (2, 8, 32)


def test_what_a_prompt_cannot_stand_before_is_refused() -> None:
    torch.manual_seed(0)
    model = inlay.attach(BertForSequenceClassification(BertConfig(**SMALL)), METHODS[2])
    with pytest.raises(inlay.AdapterError, match=r"attention_mask is \(2, 1, 8, 8\)"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(inlay.AdapterError, match="one text a row"):
        model(input_ids=IDS[None])
    with pytest.raises(inlay.AdapterError, match="needs input_ids or inputs_embeds"):
        model()
    sized = ElectraConfig(**SMALL, embedding_size=16)
    with pytest.raises(inlay.AdapterError, match="16 wide, its hidden states 32"):
        inlay.attach(ElectraModel(sized), METHODS[2])
    uneven = T5Config(**T5, num_heads=4, num_decoder_layers=3)
    with pytest.raises(inlay.AdapterError, match="differ in layers or heads"):
        inlay.attach(T5ForConditionalGeneration(uneven), METHODS[1])
    assert inlay.attach(T5ForConditionalGeneration(uneven), METHODS[2])


def test_a_prefix_of_an_encoder_decoder_says_what_checkpointing_drops() -> None:
    torch.manual_seed(0)
    model = inlay.attach(TAKEN["T5"](), METHODS[1]).train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    with pytest.raises(inlay.AdapterError, match="gradient checkpointing drops"):
        model(input_ids=IDS, labels=IDS)


def test_a_classifier_on_a_decoder_has_its_prompt() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=0))
    inlay.attach(model, inlay.PromptTuning(tokens=3))
    assert model.eval()(input_ids=IDS).logits.shape == (2, 2)
