"""Tiny models of three architectures, random and always the same."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

NAMES = ("gpt2", "qwen2", "llama")


def tiny(name: str, gpt2: dict[str, Any], others: dict[str, Any]) -> PreTrainedModel:
    """Build one of `NAMES`; the configuration of GPT-2 has words of its own."""
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**gpt2, bos_token_id=0, eos_token_id=0))
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**others, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**others))
