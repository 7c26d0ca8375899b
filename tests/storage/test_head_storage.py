"""The output head in a storage of its own, and the embedding on the host: load, save, plan, run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor
from train_tiny import losses_of, make_run
from transformers import AutoModelForCausalLM, BertConfig, BertModel, PreTrainedModel

from inlay.cli.main import main
from inlay.cli.tuned import find_tuned, load_tuned
from inlay.errors import ModelError, StorageError, UsageError
from inlay.kernels.scratch import GPU_TILE_BYTES, tile_rows
from inlay.memory.devices import device_named
from inlay.memory.simulate import fake_tensors, frozen_bytes
from inlay.memory.skeleton import config_of
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach
from inlay.model.load.heads import Head
from inlay.model.load.pretrained import load
from inlay.model.load.quantize import quantize
from inlay.model.stream.shard import resident_bytes
from inlay.storage.streamed import StreamedEmbedding
from inlay.train.adapted_model import built as planned_model
from inlay.train.run import train

WIDTHS = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 777,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 777}
IDS = torch.randint(777, (2, 12), generator=torch.Generator().manual_seed(1))
WORDS = ("dense", "nf4", "int8")


def built(name: str) -> PreTrainedModel:
    return tiny(name, GPT2, WIDTHS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path_factory.mktemp("cache")))


def loss_of(model: Any) -> Tensor:
    """The training loss with a new adapter on every layer of the blocks."""
    attach(model, LoRA(rank=2), targets=["q_proj", "down_proj"])
    return model.train()(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize(("body", "head"), list(itertools.product(WORDS, WORDS)))
def test_loaded_in_every_way_it_is_the_same_function(
    folders: dict[str, Path], body: str, head: str
) -> None:
    expected = loss_of(quantize(built("llama"), body, head_storage=head))
    for stream, embedding in itertools.product(("off", "host", "disk"), ("dense", "host")):
        model, _ = load(
            str(folders["llama"]), body, head_storage=head, embedding_storage=embedding,
            stream=stream,
        )  # fmt: skip
        assert torch.equal(loss_of(model), expected), (stream, embedding)


@pytest.mark.parametrize("head", ["nf4", "int8"])
def test_a_packed_checkpoint_keeps_its_blocks_and_packs_its_head(
    folders: dict[str, Path], tmp_path: Path, head: str
) -> None:
    first, tokenizer = load(str(folders["llama"]), "nf4")
    first.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load(str(tmp_path), head_storage=head)
    assert model.lm_head.storage == head
    assert model.model.layers[0].mlp.up_proj.storage == "nf4"
    expected = quantize(built("llama"), "nf4", head_storage=head)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    with pytest.raises(ModelError, match=rf"head_storage '{head}'.*where the head is dense"):
        load(str(tmp_path), head_storage=head, stream="disk")


@pytest.mark.parametrize(("body", "head"), [("nf4", "nf4"), ("nf4", "int8"), ("int8", "nf4")])
def test_saved_and_loaded_again_it_is_the_same_function(
    folders: dict[str, Path], tmp_path: Path, body: str, head: str
) -> None:
    first, tokenizer = load(str(folders["llama"]), body, head_storage=head)
    first.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert ("lm_head" in said["llm_int8_skip_modules"]) == (head != body)
    again, _ = load(str(tmp_path))
    assert (type(again.lm_head) is type(first.lm_head)) == (head == body)
    assert torch.allclose(again(IDS).logits, first(IDS).logits, atol=1e-6)
    if head == body:
        for other in {"nf4", "int8"} - {head}:
            with pytest.raises(StorageError, match=rf"lm_head: .*in {head} already"):
                load(str(tmp_path), head_storage=other)


def test_bitsandbytes_reads_a_packed_head(folders: dict[str, Path], tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    first, _ = load(str(folders["llama"]), "nf4", head_storage="nf4")
    first.save_pretrained(tmp_path)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(theirs.lm_head, bitsandbytes.nn.Linear4bit)
    packed = theirs.lm_head.weight
    dense = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    assert torch.equal(dense, first.lm_head.dequantize())


def test_an_embedding_on_the_host_is_saved_and_merged(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = load(str(folders["llama"]), embedding_storage="host")
    assert isinstance(model.model.embed_tokens, StreamedEmbedding)
    assert "model.embed_tokens.weight" not in dict(model.named_parameters())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_what_cannot_be_held_apart_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    tied = str(folders["qwen2"])
    for stream in ("off", "disk"):
        with pytest.raises(ModelError, match="head of Qwen2ForCausalLM is its embedding too"):
            load(tied, "nf4", head_storage="nf4", stream=stream)
    with pytest.raises(ModelError, match="embedding of Qwen2ForCausalLM is its output head too"):
        load(tied, embedding_storage="host")
    with pytest.raises(ModelError, match="embedding_storage must be one of dense, host, not 'nf4'"):
        load(tied, embedding_storage="nf4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(StorageError, match=r"no storage 'nf5'.*Did you mean 'nf4'"):
        load(tied, head_storage="nf5")
    head = Head("sequence", ("a", "b"), "single_label_classification", seed=0)
    with pytest.raises(ModelError, match="another head takes its place"):
        load(str(folders["llama"]), head_storage="nf4", head=head)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(**shape, intermediate_size=16, vocab_size=20))
    with pytest.raises(ModelError, match="BertModel has no output head"):
        quantize(encoder, head_storage="nf4")
    for task in ("classify", "reward", "embed"):
        with pytest.raises(UsageError, match=f"'head_storage' does not apply to the task '{task}'"):
            make_run(tmp_path, task=task, head_storage="nf4")


def test_a_plan_counts_what_is_loaded(tmp_path: Path) -> None:
    for words in (("dense", "dense"), ("nf4", "dense"), ("int8", "dense"), ("nf4", "host")):
        config = make_run(
            tmp_path, storage="nf4", head_storage=words[0], embedding_storage=words[1]
        )
        shape, _ = config_of(config.model)
        with fake_tensors():
            planned = frozen_bytes(planned_model(shape, config, device_named("h100", None)))
        loaded, _ = load(config.model, "nf4", head_storage=words[0], embedding_storage=words[1])
        assert planned == resident_bytes(loaded), words


def test_on_a_cpu_the_host_is_the_device(tmp_path: Path) -> None:
    sizes: list[int] = []
    for word in ("dense", "host"):
        config = make_run(tmp_path, embedding_storage=word)
        shape, _ = config_of(config.model)
        with fake_tensors():
            sizes.append(frozen_bytes(planned_model(shape, config, device_named("cpu", None))))
    assert sizes[0] == sizes[1]


def test_a_head_is_unpacked_by_parts_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert tile_rows(28672, 8192, torch.bfloat16, gpu) == 28672
    rows = tile_rows(128256, 8192, torch.bfloat16, gpu)
    assert 4 * rows == 128256
    assert rows * 8192 * 2 <= GPU_TILE_BYTES


@pytest.mark.parametrize("task", ["sft", "dpo", "grpo"])
def test_a_run_needs_only_its_folder_afterwards(tmp_path: Path, task: str) -> None:
    held = {"storage": "nf4", "head_storage": "int8", "embedding_storage": "host"}
    config = make_run(tmp_path, task=task, max_steps=2, **held)
    train(config)
    tuned = find_tuned(config.output)
    assert (tuned.storage, tuned.head_storage) == ("nf4", "int8")
    model, _ = load_tuned(tuned)
    assert model.lm_head.storage == "int8"
    alone = find_tuned(str(Path(config.output) / "adapter"))
    assert (alone.storage, alone.head_storage) == ("nf4", "int8")
    output = tmp_path / "merged"
    assert main(["merge", "--adapter", config.output, "--output", str(output)]) == 0
    merged, _ = load(str(output))
    assert type(merged.lm_head) is torch.nn.Linear
    ids = torch.tensor([[3, 5, 4, 7]])
    assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_streamed_and_resident_runs_are_equal(tmp_path: Path) -> None:
    curves = []
    for number, stream in enumerate(("off", "host", "disk")):
        config = make_run(
            tmp_path, f"out{number}", storage="nf4", head_storage="nf4", stream=stream, max_steps=2
        )
        train(config)
        curves.append([line["loss"] for line in losses_of(config.output) if "loss" in line])
    assert curves[0] == curves[1] == curves[2]
