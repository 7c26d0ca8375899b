"""What is done to a model while adapters are on it: tied, resized, copied, moved, unfrozen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import inlay
from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.adapters.registry import adapter_places

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(4))
ENDS = ["embed_tokens", "lm_head"]


def llama(tie: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=tie, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def moved(model: Any) -> Any:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for p in params.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base_logits(model: Any) -> Tensor:
    with inlay.disabled(model):
        return logits(model)


WHERE: list[dict[str, Any]] = [
    {"targets": ["q_proj"]},
    {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"targets": ["q_proj"], "modules_to_save": ENDS},
    {"targets": ["q_proj"], "trainable_tokens": [3, 5]},
    {"targets": ["q_proj", "embed_tokens"]},
    {"targets": ["q_proj", "lm_head"]},
    {"targets": ["q_proj", *ENDS]},
]
EVERYWHERE = pytest.mark.parametrize("where", WHERE, ids=lambda w: str(w))
TIES = pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])


@TIES
@EVERYWHERE
def test_tying_the_weights_again_changes_nothing(
    where: dict[str, Any], tie: bool, tmp_path: Path
) -> None:
    model = moved(inlay.attach(llama(tie), inlay.LoRA(rank=4), **where))
    y, base = logits(model), logits(llama(tie))
    model.tie_weights()
    model.model.tie_weights()
    assert torch.equal(logits(model), y)
    assert torch.equal(base_logits(model), base)
    inlay.save_adapter(model, tmp_path)
    assert torch.equal(logits(inlay.load_adapter(llama(tie), tmp_path)), y)
    assert torch.equal(logits(inlay.detach(model)), base)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    model.tie_weights()
    model.resize_token_embeddings(70)
    assert logits(model).shape[-1] == 70


@TIES
@EVERYWHERE
def test_other_embeddings_are_refused_where_an_adapter_is_at_one(
    where: dict[str, Any], tie: bool, tmp_path: Path
) -> None:
    model = moved(inlay.attach(llama(tie), inlay.LoRA(rank=4), **where))
    y = logits(model)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    at_the_input = isinstance(model.get_input_embeddings(), AdaptedLayer)
    resize: list[Callable[[], object]] = [
        lambda: model.resize_token_embeddings(70, mean_resizing=False)
    ]
    replace = [lambda: model.set_input_embeddings(nn.Embedding(70, 32))] if at_the_input else []
    for change in () if where == WHERE[0] else (*resize, *replace):
        with pytest.raises(inlay.AdapterError, match=r"inlay\.detach or inlay\.merge, then"):
            change()
        assert torch.equal(logits(model), y)
        assert logits(model).shape[-1] == 64
    if where == WHERE[0]:
        model.resize_token_embeddings(70, mean_resizing=False)
        assert torch.equal(logits(model)[..., :64], y)
        inlay.save_adapter(model, tmp_path)
        other = llama(tie)
        other.resize_token_embeddings(70, mean_resizing=False)
        assert torch.equal(logits(inlay.load_adapter(other, tmp_path)), logits(model))


@EVERYWHERE
def test_other_weights_are_loaded_into_the_base_alone(where: dict[str, Any]) -> None:
    model = moved(inlay.attach(llama(), inlay.LoRA(rank=4), **where))
    trained = {
        (n, k): p.clone()
        for n, ps in adapter_places(model, "default")
        for k, p in ps.named_parameters()
    }
    other = llama()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(base_logits(model), logits(other))
    for n, params in adapter_places(model, "default"):
        assert all(torch.equal(p, trained[n, k]) for k, p in params.named_parameters())


@pytest.mark.filterwarnings("ignore:save_pretrained of a model with adapters writes")
@pytest.mark.parametrize("where", [WHERE[1], WHERE[3], WHERE[4]], ids=lambda w: str(w))
@TIES
def test_trainer_writes_its_checkpoints(where: dict[str, Any], tie: bool, tmp_path: Path) -> None:
    model = inlay.attach(llama(tie), inlay.LoRA(rank=4), **where)
    rows = [{"input_ids": r, "labels": r} for r in IDS]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, save_strategy="steps", learning_rate=1e-2,
        per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    assert (tmp_path / "checkpoint-2").is_dir()
    assert torch.equal(base_logits(model.eval()), logits(llama(tie)))


@EVERYWHERE
def test_a_copy_is_a_model_of_its_own(where: dict[str, Any]) -> None:
    model = moved(inlay.attach(llama(True), inlay.LoRA(rank=4), **where))
    y = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), y)
    moved(other)
    other.tie_weights()
    assert not torch.equal(logits(other), y)
    assert torch.equal(logits(model), y)
    assert torch.equal(logits(inlay.detach(other)), logits(llama(True)))


def test_shared_memory_and_empty_storage() -> None:
    where = {"targets": ["q_proj"], "modules_to_save": ["norm"], "trainable_tokens": [3]}
    for method in (inlay.LoRA(rank=4), inlay.DoRA(rank=4)):
        model = moved(inlay.attach(llama(), method, **where))
        y, state = logits(model), copy.deepcopy(model.state_dict())
        model.share_memory()
        assert torch.equal(logits(model), y)
        buffers = {n: b.clone() for n, b in model.named_buffers() if n not in state}
        model.to("meta").to_empty(device="cpu")
        model.load_state_dict(state)
        for name, value in buffers.items():
            model.get_buffer(name).copy_(value)
        assert torch.equal(logits(model), y)


def test_a_base_that_was_unfrozen_is_named_when_the_adapter_is_saved(tmp_path: Path) -> None:
    model = inlay.attach(llama(), inlay.LoRA(rank=2)).requires_grad_(True)
    with pytest.warns(UserWarning, match="the base's own parameters are set to train"):
        inlay.save_adapter(model, tmp_path)
    inlay.save_adapter(inlay.use(model, "default"), tmp_path)
