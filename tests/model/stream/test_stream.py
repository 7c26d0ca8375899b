"""Streaming: bit for bit the resident model, in memory that does not grow, and no hangs."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import inlay
from inlay.errors import AdapterError, MergeError, ModelError, StorageError
from inlay.methods.base import Method
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach
from inlay.model.load.folder import EMBEDDED
from inlay.model.load.pretrained import load
from inlay.model.stream import files as stream_files
from inlay.model.stream.host import statistics, stream
from inlay.storage.buffers import ALIGNMENT, Block, Buffers, Order
from inlay.storage.streamed import StreamedEmbedding, StreamedLinear
from inlay.storage.weights_file import WeightsFile

LAYERS = 5
WIDTHS = {
    "hidden_size": 256, "intermediate_size": 328, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 777,
}  # fmt: skip
GPT2 = {
    "n_embd": 256, "n_layer": 3, "n_head": 4, "vocab_size": 777,
    "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
IDS = torch.randint(777, (2, 24), generator=torch.Generator().manual_seed(1))


def built(name: str) -> PreTrainedModel:
    return tiny(name, GPT2, WIDTHS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INLAY_CACHE", str(path))
    return path


def streamed_layers(model: nn.Module) -> dict[str, StreamedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, StreamedLinear)}


def buffers_of(model: nn.Module) -> Buffers:
    return next(iter(streamed_layers(model).values())).source.buffers


def recompute_activations(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def trained(model: PreTrainedModel, *, recompute: bool, steps: int = 3) -> list[Tensor]:
    """Return losses, logits and gradients of some steps, and what the adapter became."""
    attach(model, LoRA(rank=4, alpha=8), targets="all-linear", seed=3)
    if recompute:
        recompute_activations(model)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    seen: list[Tensor] = []
    for _ in range(steps):
        out = model(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        seen += [out.loss.detach(), out.logits.detach()]
        seen += [p.grad.clone() for p in parameters if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return seen + [p.detach().clone() for p in parameters]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("where", ["disk", "host"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("name", "storage", "options"), [
    ("llama", "nf4", {}),
    ("llama", "nf4", {"double_quant": False}),
    ("llama", "nf4", {"dtype": "bfloat16"}),
    ("qwen2", "nf4", {}),
    ("qwen2", "int8", {}),
    ("gpt2", "nf4", {}),
])  # fmt: skip
def test_streamed_training_is_resident_training_bit_for_bit(
    folders: dict[str, Path],
    name: str,
    storage: str,
    options: dict[str, Any],
    recompute: bool,
    where: Any,
) -> None:
    resident, _ = load(str(folders[name]), storage, **options)
    streamed, _ = load(str(folders[name]), storage, stream=where, **options)
    assert len(streamed_layers(streamed)) > 10
    # The resident head is torch's own product, which rounds bf16 in another place.
    resident.set_submodule("lm_head", copy.deepcopy(streamed.get_submodule("lm_head")))
    expected = trained(resident, recompute=recompute)
    assert_equal(trained(streamed, recompute=recompute), expected)


def test_dense_weights_are_streamed_from_the_checkpoint_itself(
    folders: dict[str, Path], cache: Path
) -> None:
    resident, _ = load(str(folders["llama"]))
    streamed, _ = load(str(folders["llama"]), stream="disk")
    assert isinstance(streamed.get_input_embeddings(), StreamedEmbedding)
    assert isinstance(streamed.get_output_embeddings(), StreamedLinear)
    for found, expected in zip(
        trained(streamed, recompute=False, steps=1),
        trained(resident, recompute=False, steps=1),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(cache.iterdir())


def test_a_large_head_passes_through_in_rows(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inlay.storage.sources.SEGMENT", 100_000)
    resident, _ = load(str(folders["qwen2"]), "nf4")
    streamed, _ = load(str(folders["qwen2"]), "nf4", stream="disk")
    head = streamed.get_submodule("lm_head")
    assert isinstance(head, StreamedLinear)
    assert len(head.source.segments) > 5
    weight = resident.get_submodule("lm_head").weight
    assert isinstance(weight, Tensor)
    assert torch.equal(head.dequantize(), weight)
    rows = torch.empty(150, 256)
    head.source.dequantize(rows, 60)
    assert torch.equal(rows, weight[60:210])


def test_layers_used_in_any_order(folders: dict[str, Path]) -> None:
    resident, _ = load(str(folders["llama"]), "nf4")
    streamed, _ = load(str(folders["llama"]), "nf4", stream="disk")
    layers = [n for n in streamed_layers(streamed) if "layers" in n]
    order = torch.randint(len(layers), (200,), generator=torch.Generator().manual_seed(0))
    for name in (layers[i] for i in order.tolist()):
        expected: Any = resident.get_submodule(name)
        found: Any = streamed.get_submodule(name)
        assert torch.equal(found.dequantize(), expected.dequantize())
        assert torch.equal(found.dequantize(slice(3, 9)), expected.dequantize()[3:9])


def test_two_models_and_many_threads_at_once(folders: dict[str, Path]) -> None:
    resident, _ = load(str(folders["llama"]), "nf4")
    models = [load(str(folders["llama"]), "nf4", stream=s)[0] for s in ("disk", "host")]
    expected = resident(IDS).logits

    def run(model: PreTrainedModel) -> Tensor:
        return model(IDS).logits

    with ThreadPoolExecutor(6) as pool:
        for logits in pool.map(run, models * 6, timeout=120):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_generation_learns_its_own_order(folders: dict[str, Path]) -> None:
    streamed, _ = load(str(folders["llama"]), "nf4", stream="disk")
    resident, _ = load(str(folders["llama"]), "nf4")
    settings: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = streamed.generate(IDS[:, :4], **settings)
    assert torch.equal(found, resident.generate(IDS[:, :4], **settings))
    assert statistics(streamed).loads >= LAYERS


def test_the_order_of_training_is_foreseen() -> None:
    order = Order(4)
    uses = [0, 1, 2, 3, 3, 2, 1, 0] * 3
    foreseen: list[bool] = []
    for now, following in itertools.pairwise(uses):
        order.move(now)
        foreseen.append(following in order.ahead(2))
    assert all(foreseen)


METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4),
    "dora": inlay.DoRA(rank=4),
    "ia3": inlay.IA3(),
    "bottleneck": inlay.Bottleneck(reduction=8),
    "prefix": inlay.PrefixTuning(tokens=3),
    "prompt": inlay.PromptTuning(tokens=3),
    "p-tuning": inlay.PTuning(tokens=3),
    "bitfit": inlay.BitFit(),
    "norms": inlay.NormTuning(),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_the_same(folders: dict[str, Path], name: str) -> None:
    if name.startswith("full"):
        pytest.skip("a quantised weight cannot train: see test_attach")
    outputs: list[Tensor] = []
    for where in ("off", "disk"):
        model, _ = load(str(folders["qwen2"]), "nf4", stream=where)
        attach(model, METHODS[name])
        model(input_ids=IDS, labels=IDS).loss.backward()
        outputs.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-6)


def test_an_embedding_and_a_head_are_adapted(folders: dict[str, Path]) -> None:
    targets = ["embed_tokens", "lm_head"]
    found: list[Tensor] = []
    for where in ("off", "disk"):
        model, _ = load(str(folders["llama"]), "nf4", stream=where)
        attach(model, LoRA(rank=4), targets=targets, seed=1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_an_adapter_trained_streamed_is_saved_and_loaded_resident(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    streamed, _ = load(str(folders["qwen2"]), "nf4", stream="disk")
    trained(streamed, recompute=True)
    inlay.save_adapter(streamed, tmp_path)
    resident, _ = load(str(folders["qwen2"]), "nf4")
    inlay.load_adapter(resident, tmp_path)
    with torch.no_grad():
        found, expected = streamed.eval()(IDS).logits, resident.eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    said = json.loads((tmp_path / "inlay.json").read_text())["base"]
    inlay.save_adapter(resident, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "inlay.json").read_text())["base"]
    for key in ("shapes_sha256", "values_sha256", "architecture"):
        assert said[key] == again[key]


def test_compiled_equals_eager(folders: dict[str, Path]) -> None:
    streamed, _ = load(str(folders["llama"]), "nf4", stream="disk")
    attach(streamed, LoRA(rank=4), seed=1)
    layer = streamed.get_submodule("model.layers.2.mlp.up_proj")
    x = torch.randn(7, 256, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (g,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(g, expected)
    embedding = torch.compile(streamed.get_input_embeddings(), fullgraph=True, backend="aot_eager")
    assert torch.equal(embedding(IDS), streamed.get_input_embeddings()(IDS))


# The files


def test_a_packed_copy_is_made_once_and_again_when_the_model_changes(
    llama: Path, cache: Path
) -> None:
    load(str(llama), "nf4", stream="disk")
    (copied,) = cache.iterdir()
    made = {f: f.stat().st_mtime_ns for f in copied.iterdir()}
    load(str(llama), "nf4", stream="disk")
    assert {f: f.stat().st_mtime_ns for f in copied.iterdir()} == made
    os.utime(llama / "model.safetensors")
    load(str(llama), "nf4", stream="disk")
    load(str(llama), "nf4", double_quant=False, stream="disk")
    assert len(list(cache.iterdir())) == 3


def test_the_packed_copy_is_a_checkpoint(llama: Path, cache: Path) -> None:
    load(str(llama), "nf4", stream="disk")
    (copied,) = cache.iterdir()
    for file in llama.glob("tokenizer*"):
        shutil.copy(file, copied)
    found = load(str(copied))[0].state_dict()
    expected = load(str(llama), "nf4")[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_a_packed_checkpoint_is_streamed_as_it_is(llama: Path, tmp_path: Path, cache: Path) -> None:
    first, tokenizer = load(str(llama), "nf4")
    first.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    streamed, _ = load(str(tmp_path / "packed"), stream="disk")
    with torch.no_grad():
        torch.testing.assert_close(streamed(IDS).logits, first(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not any(cache.iterdir())


def test_a_damaged_copy_is_named(llama: Path, cache: Path) -> None:
    load(str(llama), "nf4", stream="disk")
    (copied,) = cache.iterdir()
    shard = sorted(copied.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 5000)
    with pytest.raises(ModelError, match=rf"copy in the cache is damaged.*Delete {copied}"):
        load(str(llama), "nf4", stream="disk")
    shard.unlink()
    with pytest.raises(ModelError, match=r"copy in the cache is damaged.*lacks"):
        load(str(llama), "nf4", stream="disk")


def test_a_full_disk_is_named(llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream_files, "save_file", full)
    with pytest.raises(ModelError, match=r"cannot be written .*No space left.*INLAY_CACHE"):
        load(str(llama), "nf4", stream="disk")
    assert not any(cache.iterdir())


def test_a_file_cut_short_under_the_run(llama: Path, cache: Path) -> None:
    streamed, _ = load(str(llama), "nf4", stream="disk")
    streamed(IDS)
    for file in next(iter(cache.iterdir())).glob("*.safetensors"):
        os.truncate(file, 3000)
    wanted = r"ends at byte 3000, .* cut short while .* in use"
    with pytest.raises(StorageError, match=wanted):
        streamed(IDS)
    with pytest.raises(StorageError, match="cut short"):
        streamed(IDS)


def test_a_checkpoint_with_other_names_is_refused(llama: Path) -> None:
    file = llama / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b"model.layers.0.mlp.up_proj", b"model.layers.0.mlp.uq_proj"))
    with pytest.raises(ModelError, match=r"has no model.layers.0.mlp.up_proj.weight"):
        load(str(llama), stream="disk")


def test_a_tensor_of_another_shape_is_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"intermediate_size": 300}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(StorageError, match=r"shape \(328, 256\).*configuration says \(300, 256\)"):
        load(str(llama), stream="disk")


@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"\xff" * 64, (9).to_bytes(8, "little") + b"{" * 9]
)
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="truncated or damaged"):
        WeightsFile(path).tensors()


def test_bytes_are_not_seen_as_what_they_are_not(llama: Path) -> None:
    tensor = WeightsFile(llama / "model.safetensors").tensors()["model.norm.weight"]
    assert torch.equal(tensor.load(), torch.ones(256))
    assert tensor.seen_as(torch.uint8, (1024,)).nbytes == tensor.nbytes
    with pytest.raises(StorageError, match="cannot be read as"):
        tensor.seen_as(torch.uint8, (1000,))


# The thread


class Stuck:
    """A piece that cannot be brought in."""

    room = ALIGNMENT

    def fill(self, room: Tensor) -> None:
        raise RuntimeError("no such luck")

    def found_in(self, room: Tensor) -> Tensor:
        return room


def test_a_thread_that_fails_is_an_error_not_a_hang() -> None:
    block = Block()
    block.add(Stuck())
    buffers = Buffers([block], 2, torch.device("cpu"))
    with (
        pytest.raises(StorageError, match=r"ended \(RuntimeError: no such luck\)"),
        buffers.use(0),
    ):
        pass


def test_a_thread_that_is_gone_is_an_error_not_a_hang(folders: dict[str, Path]) -> None:
    streamed, _ = load(str(folders["llama"]), "nf4", stream="disk")
    buffers = buffers_of(streamed)
    with buffers.shared.changed:
        buffers.shared.closed = True
        buffers.shared.changed.notify_all()
    buffers.thread.join(10)
    with pytest.raises(StorageError, match=r"the thread .* has ended, so the model"):
        streamed(IDS)


def test_the_thread_and_files_go_with_the_model(llama: Path) -> None:
    streamed, _ = load(str(llama), stream="disk")
    out = streamed(IDS).logits
    thread = buffers_of(streamed).thread
    del streamed
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert out.isfinite().all()
    links = [f for f in Path("/proc/self/fd").iterdir() if f.exists()]
    assert not [f for f in links if str(llama) in str(f.readlink())]


def test_a_graph_that_outlives_its_model(llama: Path) -> None:
    streamed, _ = load(str(llama), "nf4", stream="disk")
    attach(streamed, LoRA(rank=2))
    loss = streamed(input_ids=IDS, labels=IDS).loss
    for _, layer in [*streamed_layers(streamed).items()]:
        del layer.source
    del streamed, layer
    gc.collect()
    with pytest.raises(StorageError, match="was deleted"):
        loss.backward()


# What cannot be done is said


def test_what_a_streamed_model_refuses(folders: dict[str, Path]) -> None:
    streamed, _ = load(str(folders["llama"]), "nf4", stream="disk")
    with pytest.raises(StorageError, match="save_adapter saves what was trained"):
        streamed.state_dict()
    with pytest.raises(StorageError, match="stays on the device it was loaded for, cpu"):
        streamed.to("meta")
    with pytest.raises(ModelError, match="no linear layer"):
        inlay.quantize(streamed, "int8")
    with pytest.raises(StorageError, match="looked up in a table of 777 rows"):
        streamed(torch.tensor([[5, 777]]))
    attach(streamed, LoRA())
    with pytest.raises(MergeError, match="load the model with stream='off'"):
        inlay.merge(streamed)
    with pytest.raises(AdapterError):
        attach(streamed, inlay.Full(), name="full")
    with pytest.raises(ModelError, match="stream must be one of off, disk, host, not 'ram'"):
        load(str(folders["llama"]), stream="ram")  # pyright: ignore[reportArgumentType]
    model, _ = load(str(folders["llama"]), "nf4")
    attach(model, LoRA())
    with pytest.raises(ModelError, match="carries adapters"):
        stream(model)
    with pytest.raises(ModelError, match="no linear layer that could be streamed"):
        stream(nn.Sequential(nn.ReLU()))
    with pytest.raises(ModelError, match="no layer of this Sequential is streamed"):
        statistics(nn.Sequential(nn.ReLU()))


def test_casting_and_copying(folders: dict[str, Path]) -> None:
    streamed, _ = load(str(folders["llama"]), "nf4", stream="host")
    twin = copy.deepcopy(streamed)
    assert torch.equal(twin(IDS).logits, streamed(IDS).logits)
    twin.to(torch.bfloat16)
    resident, _ = load(str(folders["llama"]), "nf4")
    resident.to(torch.bfloat16)
    hidden = resident.get_submodule("model")(IDS).last_hidden_state
    assert torch.equal(twin.get_submodule("model")(IDS).last_hidden_state, hidden)
    inlay.detach(attach(twin, LoRA()))
    assert torch.equal(twin.get_submodule("model")(IDS).last_hidden_state, hidden)


# Memory

MEASURE = """
import json, sys, torch
import inlay
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) * 1024

def step(folder, stream):
    model, _ = inlay.load(folder, stream=stream)
    inlay.attach(model, inlay.LoRA(rank=2), targets="all-linear")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.train()
    ids = torch.arange(16)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return model

torch.set_num_threads(1)
step(sys.argv[1], "disk")  # what the first step brings in is not the model's
base = peak()
model = step(sys.argv[2], sys.argv[3])
print(json.dumps(peak() - base))
"""


def random_checkpoint(path: Path, layers: int, width: int) -> int:
    """Write an NF4 checkpoint; return its bytes."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=512,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    inlay.quantize(model)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(EMBEDDED["pocket"]).save_pretrained(path)
    return sum(f.stat().st_size for f in path.iterdir())


def test_memory_is_that_of_the_buffers_not_of_the_model(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "small", 2, 1024)
    size = random_checkpoint(tmp_path / "large", 24, 1024)
    added = {}
    for where in ("off", "disk"):
        run = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large", where]
        done = subprocess.run(run, check=True, stdout=subprocess.PIPE, timeout=300)
        added[where] = json.loads(done.stdout)
    assert size > 120e6
    assert added["off"] > 0.8 * size
    assert added["disk"] < 0.4 * size, added
