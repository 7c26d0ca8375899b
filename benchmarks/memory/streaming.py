"""Training with the frozen weights on disk: peak memory of a 7B shape, and speed against resident.

    python -m benchmarks.memory.streaming memory --tokens 128 # all 32 layers, one step
    python -m benchmarks.memory.streaming speed               # 3 layers, 2,048 tokens, alternately

The weights are random NF4 in a Llama-2-7B's shape, written block by block, so that no dense model
is ever built. The memory is a fresh process's highest resident set, Python and torch included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import inlay
from benchmarks.lib.machine import FIGURES, write
from inlay.model.load.folder import EMBEDDED, INDEX
from inlay.model.load.quantize import bitsandbytes_config
from inlay.model.stream.host import statistics as stream_statistics
from inlay.storage.nf4 import NF4Linear
from inlay.storage.nf4_blocks import dynamic_map

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
LINEAR = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}  # fmt: skip
ALTERNATIONS = 5
THREADS = 2
AGAIN = (sys.executable, "-m", "benchmarks.memory.streaming")
"""Runs this module again, in a fresh process."""


def main() -> None:
    """Run one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "speed", "step", "make"])
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/inlay-streaming"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "memory":
        memory(given.folder, given.layers or 32, given.tokens or 128, given.threads)
    elif given.what == "speed":
        speed(given.folder, given.layers or 3, given.tokens or 2048)
    elif given.what == "make":
        make(given.folder, given.layers)
    else:
        print(json.dumps(step(given.folder, given.tokens)))


def memory(parent: Path, layers: int, tokens: int, threads: int) -> None:
    """Measure one training step in a fresh process; add it to the results."""
    folder = made(parent, layers)
    run = [*AGAIN, "step", "--folder", str(folder), "--tokens", str(tokens)]
    run += ["--threads", str(threads)]
    found = json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE).stdout)
    found["checkpoint_gb"] = round(sum(f.stat().st_size for f in folder.iterdir()) / 1e9, 3)
    keep({f"memory_{layers}_layers_{tokens}_tokens": found})


def made(parent: Path, layers: int) -> Path:
    """Return the folder of the checkpoint; a separate process writes it if it does not exist."""
    folder = parent / f"llama-7b-{layers}"
    if not (folder / "config.json").is_file():
        run = [*AGAIN, "make", "--folder", str(folder), "--layers", str(layers)]
        subprocess.run(run, check=True)
    return folder


def step(folder: Path, tokens: int) -> dict[str, Any]:
    """Load, attach, and train one step; return its time and this process's peak memory."""
    started = time.perf_counter()
    model, optimizer = prepared(folder, "disk")
    loaded = time.perf_counter()
    after_load = status("VmHWM")
    loss = train_step(model, optimizer, tokens)
    seconds = time.perf_counter() - loaded
    brought = stream_statistics(model)
    return {
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "peak_rss_gb": status("VmHWM"),
        "rss_after_load_gb": after_load,
        "load_seconds": round(loaded - started, 2),
        "step_seconds": round(seconds, 2),
        "loss": loss,
        "brought_in_gb": round(brought.bytes / 1e9, 2),
        "waits": brought.waits,
        "seconds_waited": round(brought.waited, 3),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def prepared(folder: Path, stream: Any) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    """Return the model with LoRA on every linear layer, recomputing all but layer inputs."""
    model, _ = inlay.load(str(folder), stream=stream)
    inlay.attach(model, inlay.LoRA(rank=16, alpha=32), targets="all-linear")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=1e-4)


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, tokens: int) -> float:
    """Train on random tokens once; return the loss."""
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=seed)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def speed(parent: Path, layers: int, tokens: int) -> None:
    """Time the streamed and the resident model's steps alternately; add it to the results."""
    folder = made(parent, layers)
    pairs = {stream: prepared(folder, stream) for stream in ("off", "disk")}
    seconds: dict[str, list[float]] = {stream: [] for stream in pairs}
    losses: dict[str, list[float]] = {stream: [] for stream in pairs}
    for _ in range(ALTERNATIONS):
        for stream, (model, optimizer) in pairs.items():
            begun = time.perf_counter()
            losses[stream].append(train_step(model, optimizer, tokens))
            seconds[stream].append(time.perf_counter() - begun)
            print(stream, seconds[stream][-1], losses[stream][-1], flush=True)
    ratios = [off / disk for off, disk in zip(seconds["off"], seconds["disk"], strict=True)]
    brought = stream_statistics(pairs["disk"][0])
    found = {
        "layers": layers,
        "tokens": tokens,
        "resident_seconds": seconds["off"],
        "streamed_seconds": seconds["disk"],
        "speed_of_resident_median": statistics.median(ratios),
        "speed_of_resident_range": [min(ratios), max(ratios)],
        "same_losses": losses["off"] == losses["disk"],
        "waits": brought.waits,
        "seconds_waited": brought.waited,
        "brought_in_gb": brought.bytes / 1e9,
    }
    keep({f"speed_{layers}_layers_{tokens}_tokens": found})


def keep(found: dict[str, Any]) -> None:
    """Add figures to the committed results."""
    path = FIGURES / "streaming.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    before.pop("machine", None)
    print(json.dumps(found, indent=1))
    write("streaming", {"shape": SHAPE, **before, **found})


def status(field: str) -> float:
    """Return a field of this process's status, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024 / 1e9


def make(folder: Path, layers: int) -> None:
    """Write a random NF4 checkpoint, block by block."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    places: dict[str, str] = {}
    count = layers + 1
    for number, tensors in enumerate([*blocks(layers)], 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        held = tensors()
        save_file(held, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(held, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file in EMBEDDED["pocket"].glob("tokenizer*"):
        shutil.copy(file, folder)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=False)
    packed = bitsandbytes_config(random_nf4((8, 64)), ["lm_head"])
    said = config.to_dict() | {"dtype": "bfloat16", "quantization_config": packed}
    (folder / "config.json").write_text(json.dumps(said | {"architectures": ["LlamaForCausalLM"]}))


def blocks(layers: int) -> Iterator[Any]:
    """Yield a function for each file that makes its tensors."""
    yield ends
    for layer in range(layers):
        yield lambda layer=layer: block(f"model.layers.{layer}.")


def block(prefix: str) -> dict[str, Tensor]:
    """Return one Transformer block's tensors."""
    width = SHAPE["hidden_size"]
    found = {
        f"{prefix}{name}.weight": torch.ones(width, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    for name, shape in LINEAR.items():
        layer = random_nf4(shape)
        found |= {f"{prefix}{name}.{key}": t for key, t in layer.serialized().items()}
    return found


def ends() -> dict[str, Tensor]:
    """Return the dense tensors outside the blocks: embedding, head and last norm."""
    shape = (SHAPE["vocab_size"], SHAPE["hidden_size"])
    return {
        "model.embed_tokens.weight": (0.02 * torch.randn(shape)).bfloat16(),
        "lm_head.weight": (0.02 * torch.randn(shape)).bfloat16(),
        "model.norm.weight": torch.ones(shape[1], dtype=torch.bfloat16),
    }


def random_nf4(shape: tuple[int, int]) -> NF4Linear:
    """Return a layer of random packed bytes; its weights are about 0.02 large."""
    size = shape[0] * shape[1]
    return NF4Linear(
        shape, torch.bfloat16, None,
        weight=torch.randint(256, (size // 2, 1), dtype=torch.uint8),
        absmax=torch.randint(256, (size // 64,), dtype=torch.uint8),
        nested_absmax=torch.full((-(-size // 64 // 256),), 0.01),
        nested_quant_map=dynamic_map(torch.device("cpu")).clone(),
        nested_offset=torch.tensor(0.04),
    )  # fmt: skip


if __name__ == "__main__":
    main()
