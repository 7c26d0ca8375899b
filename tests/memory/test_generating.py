"""Answers on fake tensors: the cache is its formula, and a plan grows where they are the most."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Lfm2Config, LlamaConfig, MistralConfig

import inlay
from inlay.evaluate.generation import Sampling, continued, settings
from inlay.kernels.native import return_free_memory
from inlay.memory.devices import Device
from inlay.memory.generating import Answering, simulate_answers
from inlay.memory.optimisers import adamw
from inlay.memory.plan import Plan, Task, plan
from inlay.memory.probe import measuring, resident
from inlay.memory.skeleton import skeleton

SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "dtype": "float32", "max_position_embeddings": 2048,
}  # fmt: skip
ROOMY = Device("cpu", "cpu", 1 << 50, 1e10, 1e11, 1e11)
ASKED = Answering(rows=16, prompt=20, tokens=100, sorts=False)


def build(method: Any = None, storage: str = "dense") -> Any:
    def made() -> Any:
        model = skeleton(LlamaConfig(**SHAPE), storage, double_quant=True, dtype="auto")
        return inlay.attach(model, method or inlay.LoRA(rank=4)).train()

    return made


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_the_cache_is_that_of_whole_prompts_and_answers(storage: str) -> None:
    found = simulate_answers(build(storage=storage), ASKED, "cpu")
    per_token = 3 * 2 * 2 * 16 * 4
    assert found.cache == 16 * (20 + 100 - 1) * per_token
    assert found.each["aten.cat"].calls >= 2 * 3
    assert sum(w.flops for w in found.first.values()) > sum(w.flops for w in found.each.values())


def test_a_prompt_adapter_is_in_the_cache_too() -> None:
    plain = simulate_answers(build(), ASKED, "cpu")
    longer = simulate_answers(build(inlay.PrefixTuning(tokens=8)), ASKED, "cpu")
    assert longer.cache - plain.cache == 16 * 8 * 3 * 2 * 2 * 16 * 4


def test_layers_that_see_a_window_or_keep_a_state_hold_no_more_than_that() -> None:
    def found(config: Any, tokens: int) -> int:
        def made() -> Any:
            model = skeleton(config, double_quant=True, dtype="bfloat16")
            return inlay.attach(model, inlay.LoRA(rank=4)).train()

        return simulate_answers(made, replace(ASKED, tokens=tokens), "cpu").cache

    per_token = 3 * 2 * 2 * 16 * 2
    window = MistralConfig(**SHAPE, sliding_window=32)
    assert found(window, 100) == pytest.approx(16 * 31 * per_token, rel=0.01)
    states = Lfm2Config(**SHAPE, layer_types=["conv", "full_attention", "conv"])
    more = found(states, 101) - found(states, 100)
    assert more == 16 * per_token / 3


def test_sorting_the_logits_takes_room() -> None:
    wide = {**SHAPE, "vocab_size": 1 << 17}

    def made() -> Any:
        model = skeleton(LlamaConfig(**wide), "dense", double_quant=True, dtype="auto")
        return inlay.attach(model, inlay.LoRA(rank=4))

    drawn = simulate_answers(made, ASKED, "cpu").buffers
    sorted_too = simulate_answers(made, replace(ASKED, sorts=True), "cpu").buffers
    logits = 16 * (1 << 17) * 4
    assert 3 * logits <= drawn <= 5 * logits
    assert sorted_too >= drawn + 2 * logits


def planned(answering: Answering | None) -> Plan:
    ids = torch.zeros(2, 32, dtype=torch.long)
    task = Task(
        build=build(),
        batch={"input_ids": ids, "labels": ids},
        loss=lambda model, batch: model(**batch, use_cache=False).loss,
        optimiser=adamw,
        accumulation=1,
        dtype=torch.float32,
        answering=answering,
    )
    return plan(task, ROOMY, runtime=lambda products: 0)


def test_a_plan_grows_only_where_answers_are_the_most() -> None:
    alone, few = planned(None).best, planned(Answering(2, 8, 8, sorts=False)).best
    many = planned(Answering(64, 20, 200, sorts=False)).best
    assert (few.total, few.bytes) == (alone.total, alone.bytes)
    assert few.seconds > alone.seconds
    assert many.total > alone.total
    assert many.bytes["key-value cache"] == 64 * 219 * 3 * 2 * 2 * 16 * 4
    assert sum(many.bytes.values()) == many.total
    assert many.passes == alone.passes


@pytest.mark.slow
def test_what_is_planned_is_what_a_generation_holds() -> None:
    model, tokenizer = inlay.load("pocket", dtype="float32")
    inlay.attach(model, inlay.LoRA(rank=8)).eval()
    prompts = [[5] * 40 for _ in range(64)]

    def generate(tokens: int) -> None:
        config = settings(tokens, [], tokenizer, Sampling())
        config.eos_token_id = []
        with torch.no_grad():
            continued(model, prompts, config)

    generate(160)  # what a first run brings in for good is not the cache's
    gc.collect()
    return_free_memory()
    before = resident()
    with measuring(torch.device("cpu")) as found:
        generate(160)
    if found.peak is None:
        pytest.skip("the system does not tell a process's peak")

    def made() -> Any:
        bare = skeleton(model.config, "dense", double_quant=True, dtype="float32")
        return inlay.attach(bare, inlay.LoRA(rank=8))

    answered = simulate_answers(made, Answering(64, 40, 160, sorts=False), "cpu")
    expected = answered.cache + answered.buffers
    assert found.peak - before == pytest.approx(expected, rel=0.25)
