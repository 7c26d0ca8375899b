"""Prompts on encoders: HF PEFT is the oracle for values, gradients, counts and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor

import inlay
from inlay.peft import PeftModel, get_peft_model

IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
TYPES = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
TOKENS = 3
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0,
    "initializer_range": 0.2, "num_labels": 2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2,
}  # fmt: skip
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
T = transformers
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "BERT": ("FEATURE_EXTRACTION", lambda: T.BertModel(T.BertConfig(**SMALL))),
    "RoBERTa": ("FEATURE_EXTRACTION", lambda: T.RobertaModel(T.RobertaConfig(**SMALL))),
    "DeBERTa": (
        "FEATURE_EXTRACTION", lambda: T.DebertaModel(T.DebertaConfig(**SMALL, **RELATIVE)),
    ),
    "DeBERTa v2": (
        "FEATURE_EXTRACTION", lambda: T.DebertaV2Model(T.DebertaV2Config(**SMALL, **RELATIVE)),
    ),
    "BERT classifier": ("SEQ_CLS", lambda: T.BertForSequenceClassification(T.BertConfig(**SMALL))),
    "RoBERTa classifier": (
        "SEQ_CLS", lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**SMALL)),
    ),
    "DeBERTa classifier": (
        "SEQ_CLS", lambda: T.DebertaForSequenceClassification(T.DebertaConfig(**SMALL)),
    ),
    "BERT tagger": ("TOKEN_CLS", lambda: T.BertForTokenClassification(T.BertConfig(**SMALL))),
    "masked LM": ("FEATURE_EXTRACTION", lambda: T.RobertaForMaskedLM(T.RobertaConfig(**SMALL))),
    "BERT answers": ("QUESTION_ANS", lambda: T.BertForQuestionAnswering(T.BertConfig(**SMALL))),
}  # fmt: skip
METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "prompt": (PromptTuningConfig, {}),
    "p-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 20}),
    "prefix": (PrefixTuningConfig, {}),
}
TAKES_KEYS = ("BERT", "RoBERTa", "masked LM")
EVERY = [
    (name, method)
    for name in MODELS
    for method in METHODS
    if method != "prefix" or name in TAKES_KEYS
]
every = pytest.mark.parametrize(("name", "method"), EVERY)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),
]


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name][1]()


def both(name: str, method: str) -> tuple[Any, Any]:
    """The same adapter in both libraries."""
    found = []
    cls, options = METHODS[method]
    for make in (get_peft_model, peft.get_peft_model):
        base = build(name)
        torch.manual_seed(7)
        config = cls(task_type=MODELS[name][0], num_virtual_tokens=TOKENS, **options)
        found.append(make(base, config))
    return found[0], found[1]


def batch(name: str) -> dict[str, Tensor]:
    """A padded batch; token types where HF PEFT keeps them."""
    types = {} if MODELS[name][0] == "FEATURE_EXTRACTION" else {"token_type_ids": TYPES}
    return {"input_ids": IDS, "attention_mask": MASK, **types}


def outputs(model: Any, call: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in model(**call).items() if isinstance(v, Tensor)}


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


def loss_of(found: dict[str, Tensor]) -> Tensor:
    """A loss of every output in which no symmetry makes gradients vanish."""
    return sum((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in found.values())  # type: ignore[return-value]


@every
def test_the_same_seed_gives_the_same_values_counts_and_gradients(name: str, method: str) -> None:
    ours, theirs = both(name, method)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for key in ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
        assert getattr(ours.active_peft_config, key) == getattr(theirs.active_peft_config, key)
    kept = []
    for model in (ours, theirs):
        found = outputs(model.eval(), batch(name))
        loss_of(found).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        kept.append((found, {n: g for n, g in grads.items() if n.startswith("prompt_encoder")}))
        assert all(g is not None for g in grads.values())
    alike(kept[0][0], kept[1][0])
    assert kept[0][1].keys() == kept[1][1].keys()
    assert kept[0][1]
    for key, grad in kept[0][1].items():
        torch.testing.assert_close(grad, kept[1][1][key], rtol=1e-3, atol=1e-5)
