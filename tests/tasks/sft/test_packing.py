"""Rows joined without padding train as padded ones do, and no row sees another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_tiny import adapter_hash, losses_of, make_data, make_model, make_run
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from inlay.errors import UsageError
from inlay.methods.prefix import PrefixTuning
from inlay.model.adapters.attach import attach
from inlay.model.fast.packing import mixes_rows, positions, segments
from inlay.train import arguments
from inlay.train.collate import Concatenated
from inlay.train.output.events import Event
from inlay.train.run import train

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DROPLESS: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
ROWS = [[3, 4, 5, 6], [7, 8, 9, 3, 4]]


def model_of(kind: str, **ids: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SMALL, **ids))
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4, **ids))
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **ids))
    return GPT2LMHeadModel(GPT2Config(**GPT2, **DROPLESS, **ids))


def save(folder: Path, kind: str) -> None:
    """Write a model of this kind and the rows into a folder that `make_run` uses as it is."""
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    if kind == "llama":
        return
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = model_of(kind, vocab_size=len(tokenizer), bos_token_id=None, **ids)
    for file in (folder / "model").glob("model*"):
        file.unlink()
    model.save_pretrained(folder / "model")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_packed_losses_are_the_padded_ones(tmp_path: Path, kind: str):
    save(tmp_path, kind)
    run = {"max_steps": 20, "epochs": 4.0, "dropout": 0.0, "evaluate": False, "log_every": 1}
    train(make_run(tmp_path, "packed", packing=True, **run))
    train(make_run(tmp_path, "padded", packing=False, **run))
    packed, padded = losses_of(tmp_path / "packed"), losses_of(tmp_path / "padded")
    assert len(packed) == len(padded) > 20
    for one, other in zip(packed, padded, strict=True):
        assert one.get("tokens") == other.get("tokens")
        for name in ("loss", "eval_loss"):
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), abs=1e-5)


def test_a_packed_run_is_the_same_twice(tmp_path: Path):
    for name in ("one", "two"):
        train(make_run(tmp_path, name, evaluate=False))
    assert adapter_hash(tmp_path / "one") == adapter_hash(tmp_path / "two")


def test_a_model_without_positions_is_padded_and_that_is_told(tmp_path: Path):
    save(tmp_path, "bloom")
    told: list[Event] = []
    train(make_run(tmp_path, max_steps=2, evaluate=False), on_event=told.append)
    notes = [event.message for event in told if event.kind == "note"]
    assert "batches are padded, not packed: BloomForCausalLM takes no positions" in notes


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mistral"])
def test_rows_stay_apart(kind: str):
    assert mixes_rows(model_of(kind, vocab_size=16).eval(), ROWS) is None


def test_a_prefix_mixes_rows():
    model = model_of("qwen2", vocab_size=16)
    attach(model, PrefixTuning(tokens=2))
    assert "its logits change by" in str(mixes_rows(model, ROWS))


def test_what_leaks_a_little_is_found():
    model = model_of("qwen2", vocab_size=16)

    def leak(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        del module, args
        return output + 3e-4 * output.mean(dim=1, keepdim=True)

    model.model.norm.register_forward_hook(leak)
    assert mixes_rows(model, ROWS) is not None


def test_joined_rows():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Concatenated(multiple=3)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert int(batch["padding"]) == 2
    assert segments(batch["position_ids"][0]) == [(0, 3), (3, 4), (4, 6)]
    assert segments(positions([3, 1, 2, 0])[0]) == [(0, 3), (3, 4), (4, 6)]


# Optimisers of bitsandbytes.


class KilledError(Exception):
    pass


def killed_at(step: int) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            raise KilledError

    return watch


def test_8_bit_states_train_and_resume_bit_for_bit(tmp_path: Path):
    run = {"optimizer": "adamw-8bit", "rank": 128, "evaluate": False}
    train(make_run(tmp_path, "whole", **run))
    measured = [x["eval_loss"] for x in losses_of(tmp_path / "whole") if "eval_loss" in x]
    assert measured[-1] < measured[0]
    with pytest.raises(KilledError):
        train(make_run(tmp_path, "killed", **run), on_event=killed_at(7))
    train(make_run(tmp_path, "killed", resume=True, **run))
    assert adapter_hash(tmp_path / "killed") == adapter_hash(tmp_path / "whole")


def test_paged_states_on_a_cpu_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="between a GPU and the host, and this model is on cpu"):
        train(make_run(tmp_path, optimizer="paged-adamw-8bit", evaluate=False))


def test_without_bitsandbytes_its_optimizers_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="which is not installed"):
        arguments.check_optimizer("adamw-8bit", "cpu")
    arguments.check_optimizer("adamw", "cpu")
