"""The cost of the fast paths' proofs: processor time, compared with a short run's.

    python -m benchmarks.speed.self_proof [--dry]

A run is so many training steps of a small model, adapted; the proofs are those of its class, in a
process that knows none. Both are the process's own processor time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import inlay
from benchmarks.lib.machine import write
from inlay.model.fast import proof
from inlay.model.fast.install import install, uninstall

SHAPE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 8, "max_position_embeddings": 1024,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=64)),
    "Gemma 3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=64, sliding_window=128)
    ),
    "DeepSeek-V3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SHAPE, num_key_value_heads=8, moe_intermediate_size=128, n_routed_experts=8,
            num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=64, q_lora_rank=128,
            qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
        )
    ),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def seconds(work: Callable[[], Any]) -> float:
    """Return the processor time that something takes."""
    before = time.process_time()
    work()
    return time.process_time() - before


def proofs(model: PreTrainedModel) -> tuple[float, float, list[str]]:
    """Return the time to install without known proofs and with all known, and the notes."""
    proof.verdicts.clear()
    notes: list[str] = []
    first = seconds(lambda: notes.extend(install(model)))
    uninstall(model)
    again = seconds(lambda: install(model))
    uninstall(model)
    return first, again, notes


def steps(model: PreTrainedModel, count: int, tokens: int) -> float:
    """Return the time of this many training steps of four rows."""
    inlay.attach(model, inlay.LoRA(rank=8)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    called: Any = model

    def work() -> None:
        for number in range(count):
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(3, SHAPE["vocab_size"], (4, tokens), generator=generator)
            called(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    return seconds(work)


def measured(name: str, dtype: str, count: int, tokens: int) -> dict[str, Any]:
    """Return one row of the table."""
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    model = model.to(DTYPES[dtype])
    first, again, notes = proofs(model)
    run = steps(model, count, tokens)
    return {
        "model": name,
        "dtype": dtype,
        "proof_seconds": round(first, 4),
        "known_seconds": round(again, 4),
        "run_seconds": round(run, 3),
        "share": round(first / run, 5),
        "steps": count,
        "tokens": 4 * tokens,
        "notes": notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--dry", action="store_true", help="write no file")
    asked = parser.parse_args()
    rows = [
        measured(name, dtype, asked.steps, asked.tokens)
        for name in asked.models
        for dtype in asked.dtypes
    ]
    for row in rows:
        print(
            f"{row['model']:12} {row['dtype']:9} proof {row['proof_seconds']:.2f} s, "
            f"known {row['known_seconds']:.3f} s, {row['steps']} steps {row['run_seconds']:.1f} s: "
            f"{row['share']:.2%}"
        )
    if not asked.dry:
        write("self_proof", {"rows": rows})


if __name__ == "__main__":
    main()
