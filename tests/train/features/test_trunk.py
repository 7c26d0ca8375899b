"""The blocks below the lowest adapted one run once a row, and no gradient enters them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_tiny import adapter_hash, losses_of, make_run
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from inlay.errors import UsageError
from inlay.memory import devices
from inlay.methods.lora import LoRA
from inlay.methods.prefix import PrefixTuning
from inlay.model.adapters.attach import attach, detach
from inlay.model.trunk import PassThrough, Trunk, trunk_of
from inlay.train.features.cache import InFile
from inlay.train.features.trunk import TrunkCache, cached_trunk
from inlay.train.output.events import Event
from inlay.train.run import train

SMALL: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
KINDS = ["qwen2", "gpt2", "gemma2"]


class Row:
    def __init__(self, *input_ids: int) -> None:
        self.input_ids, self.trained = list(input_ids), [True] * len(input_ids)


ROWS = [Row(3, 4, 5, 6), Row(7, 8, 9), Row(3, 4), Row(9, 3, 8, 7, 5)]


def model_of(kind: str, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SMALL, attention_dropout=dropout))
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SMALL, query_pre_attn_scalar=8))
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=16, n_embd=32, n_layer=4, n_head=4, n_positions=64,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=dropout,
        )
    )  # fmt: skip


def trained(model: PreTrainedModel, **where: Any) -> PreTrainedModel:
    """Put a LoRA on a model with values as if trained."""
    attach(model, LoRA(rank=2), **where)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model


def batch(*rows: Row) -> dict[str, torch.Tensor]:
    ids = [token for row in rows for token in row.input_ids]
    where = [i for row in rows for i in range(len(row.input_ids))]
    return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([where])}


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_whole_model(tmp_path: Path, kind: str):
    model = trained(model_of(kind), layers="3")
    cache = cached_trunk(model, ROWS, len(ROWS), tmp_path / "trunk.tmp")
    assert isinstance(cache, TrunkCache)
    assert cache.trunk.depth == 3
    model.train()
    runs: list[int] = []
    cache.trunk.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    call = batch(ROWS[3], ROWS[0], ROWS[2])
    found: list[list[torch.Tensor]] = []
    for used in (False, True):
        model.zero_grad()
        with cache.used() if used else torch.enable_grad():
            loss = model(**call, labels=call["input_ids"], use_cache=False).loss
            loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *grads])
    assert len(runs) == 1
    assert len(found[0]) == len(found[1]) > 1
    for whole, read in zip(*found, strict=True):
        torch.testing.assert_close(read, whole, rtol=1e-4, atol=1e-6)
    assert not any(isinstance(module, PassThrough) for module in model.modules())


def test_padded_batches_read_it_and_others_run_the_blocks(tmp_path: Path):
    model = trained(model_of("qwen2"), layers="3").eval()
    cache = cached_trunk(model, ROWS, len(ROWS), tmp_path / "trunk.tmp")
    assert isinstance(cache, TrunkCache)
    ids, mask = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]]), torch.tensor([[1] * 4, [1, 1, 1, 0]])
    own = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    padded: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    assert cache.get(padded) is not None
    others: list[dict[str, Any]] = [
        {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)},
        {"input_ids": ids},
        {"input_ids": ids[:1], "position_ids": torch.arange(4)[None] + 1},
        {"input_ids": ids[:1], "past_key_values": object()},
        {"inputs_embeds": torch.zeros(1, 4, 32)},
        batch(ROWS[0], ROWS[1]),
    ]
    assert [cache.get(call) for call in others] == [None] * len(others)
    assert cache.get({**batch(ROWS[0], ROWS[1]), "use_cache": False}) is not None
    with cache.used():
        read = model(**padded).logits[mask.bool()]
    torch.testing.assert_close(read, own, rtol=1e-4, atol=1e-6)


def test_a_call_that_fails_leaves_the_model_as_it_was(tmp_path: Path):
    model = trained(model_of("qwen2"), layers="3")
    cache = cached_trunk(model, ROWS, len(ROWS), tmp_path / "trunk.tmp")
    assert isinstance(cache, TrunkCache)
    blocks = list(cache.trunk.blocks)
    with cache.used(), pytest.raises(TypeError):
        model(**batch(ROWS[0]), labels=3)
    assert list(cache.trunk.blocks) == blocks


def test_a_cache_too_large_for_memory_lies_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = trained(model_of("qwen2"), layers="2-3")
    first = cached_trunk(model, ROWS, len(ROWS), tmp_path / "trunk.tmp")
    monkeypatch.setattr(devices, "cgroup_rooms", lambda: [0])
    second = cached_trunk(model, ROWS, len(ROWS), tmp_path / "trunk.tmp")
    assert isinstance(first, TrunkCache)
    assert isinstance(second, TrunkCache)
    assert "in memory" not in str(second)
    assert first.outputs.keys() == second.outputs.keys()
    for row, output in first.outputs.items():
        there = second.outputs[row]
        assert isinstance(output, torch.Tensor)
        assert isinstance(there, InFile)
        assert torch.equal(output, there.read())
    size = sum(len(row) for row in first.outputs) * 32 * 4  # each row once, padding too
    assert second.path.stat().st_size == second.bytes_in_file == first.bytes_in_memory == size
    with second.used():
        pass
    assert not second.path.exists()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (trained(model_of("gpt2", dropout=0.1), layers="3"), "dropout"),
        (trained(model_of("qwen2", dropout=0.1), layers="3"), "dropout"),
        (trained(model_of("qwen2"), layers="0,3"), "the lowest block trains"),
        (attach(model_of("qwen2"), PrefixTuning(tokens=2)), "something below .* trains"),
        (trained(model_of("qwen2"), targets=["embed_tokens"]), "something below .* trains"),
    ],
)
def test_where_it_cannot_be_kept_a_reason_is_told(tmp_path: Path, model: nn.Module, reason: str):
    found = cached_trunk(model, ROWS, len(ROWS), tmp_path / "trunk.tmp")
    assert isinstance(found, str)
    assert re.search(reason, found)


def test_a_trunk_that_hands_on_more_than_its_output_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "cgroup_rooms", lambda: [0])
    model = trained(model_of("qwen2"), layers="3")
    seen: list[torch.Tensor] = []
    blocks = model.model.layers
    blocks[0].register_forward_hook(
        lambda module, args, output: seen.__setitem__(slice(None), [output])
    )
    blocks[3].register_forward_hook(
        lambda module, args, output: output + seen.pop().roll(1, -1) if seen else output
    )
    assert "off by" in str(cached_trunk(model, ROWS, len(ROWS), tmp_path / "trunk.tmp"))
    assert not list(tmp_path.iterdir())


# A whole run.

RUN: dict[str, Any] = {"layers": "1", "evaluate": False, "dropout": 0.0, "log_every": 1}


def test_a_run_with_it_is_a_run_without_it(tmp_path: Path):
    told: list[Event] = []
    train(make_run(tmp_path, "with", **RUN), on_event=told.append)
    train(make_run(tmp_path, "without", cache_trunk=False, **RUN))
    assert any("blocks 0-0 are frozen and ran once" in e.message for e in told if e.kind == "note")
    read, ran = losses_of(tmp_path / "with"), losses_of(tmp_path / "without")
    for name in ("loss", "eval_loss"):
        assert [x.get(name, 0) for x in read] == pytest.approx([x.get(name, 0) for x in ran], 1e-5)


class KilledError(Exception):
    pass


def test_a_resumed_run_reads_the_same_bits(tmp_path: Path):
    def watch(event: Event) -> None:
        if event.kind == "step" and event.step == 7:
            raise KilledError

    run = {**RUN, "dropout": 0.1, "packing": "auto"}
    train(make_run(tmp_path, "whole", **run))
    with pytest.raises(KilledError):
        train(make_run(tmp_path, "killed", **run), on_event=watch)
    train(make_run(tmp_path, "killed", resume=True, **run))
    assert adapter_hash(tmp_path / "killed") == adapter_hash(tmp_path / "whole")


def test_asked_for_where_it_cannot_be_is_a_sentence(tmp_path: Path):
    with pytest.raises(UsageError, match="'cache_trunk' cannot be used: the lowest block trains"):
        train(make_run(tmp_path, cache_trunk=True, evaluate=False))


# No gradient below the lowest adapted block.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [None, {"use_reentrant": False}])
def test_no_gradient_enters_the_trunk(kind: str, recompute: dict[str, Any] | None):
    model = trained(model_of(kind), layers="3").train()
    if recompute is not None:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(recompute)
    trunk = trunk_of(model)
    assert isinstance(trunk, Trunk)
    grads: list[bool] = []
    for block in trunk.blocks:
        block.register_forward_hook(lambda m, a, output: grads.append(output.requires_grad))
    call = batch(ROWS[0])
    model(**call, labels=call["input_ids"], use_cache=False).loss.backward()
    assert grads == [False, False, False, True]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_reentrant_checkpointing_still_has_its_input_gradients():
    model = trained(model_of("qwen2"), layers="3").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    call = batch(ROWS[0])
    model(**call, labels=call["input_ids"], use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_detached_model_asks_for_gradients_as_it_did():
    model = model_of("qwen2")
    detach(attach(model, LoRA(rank=2)))
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
