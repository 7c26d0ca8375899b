"""Several threads that ask one adapted model, and the modes that a thread may be in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import inlay

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
                         "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
METHODS: dict[str, Any] = {
    "lora": inlay.LoRA(rank=2),
    "prefix": inlay.PrefixTuning(tokens=3),
    "prompt": inlay.PromptTuning(tokens=3),
}
TEXTS = [torch.randint(0, 64, (2, 5 + 3 * n)) for n in range(4)]


def adapted(model: Any, method: str) -> Any:
    torch.manual_seed(0)
    inlay.attach(model, METHODS[method])
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p))
    return model.eval()


def in_threads(ask: Any) -> None:
    """Raise unless threads at work together get what each gets alone."""
    alone = [ask(text) for text in TEXTS]
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        for found in pool.map(lambda number: (number % 4, ask(TEXTS[number % 4])), range(32)):
            torch.testing.assert_close(found[1], alone[found[0]])


@pytest.mark.parametrize("method", METHODS)
def test_threads_that_generate_together_get_their_own_answers(method: str) -> None:
    model = adapted(LlamaForCausalLM(LlamaConfig(**SMALL, pad_token_id=0)), method)

    def answered(text: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(text)
        return model.generate(text, attention_mask=mask, max_new_tokens=4, do_sample=False)

    in_threads(answered)


@pytest.mark.parametrize("method", METHODS)
def test_threads_that_encode_together_get_their_own_outputs(method: str) -> None:
    model = adapted(BertModel(BertConfig(**SMALL)), method)

    @torch.no_grad()
    def encoded(text: torch.Tensor) -> torch.Tensor:
        return model(input_ids=text).last_hidden_state

    in_threads(encoded)


def test_what_is_attached_in_inference_mode_trains() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.inference_mode():
        inlay.attach(model, inlay.DoRA(rank=2))
    model.train()
    model(input_ids=TEXTS[0], labels=TEXTS[0]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
