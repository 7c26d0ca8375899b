"""Adapters on the top quarter of a 0.5B shape, the frozen trunk read from a cache, on real rows.

    python -m benchmarks.speed.trunk_cache [--alternations 5] [--layers 24]

One model with two adapters, one on all blocks and one on the top quarter. Each alternation trains
each on the same microbatches: all blocks, the top quarter, the top quarter with the cache (as from
the second epoch on), and all blocks again, whose ratio to the first is the machine's noise. The
rows are radiology reports, findings to impression, the prompt masked, lengths as they come.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import inlay
from benchmarks.lib.machine import REPORTS, write
from inlay.data.text_reader import TextReader
from inlay.data.tokens import encode
from inlay.model.load.folder import located
from inlay.model.load.tokenizer import read_tokenizer
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.train.collate import Concatenated, labels
from inlay.train.features.trunk import TrunkCache, cached_trunk
from inlay.train.rows import rows_of_run

THREADS = 2
BATCH = 4
SHAPE = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 32768, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    """Measure, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--microbatches", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, given.dtype)
    rows = real_rows(BATCH * given.microbatches)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_hidden_layers=given.layers)).to(dtype)
    top = f"{given.layers * 3 // 4}-{given.layers - 1}"
    inlay.attach(model, inlay.LoRA(rank=16), name="all")
    inlay.attach(model, inlay.LoRA(rank=16), layers=top, name="top")
    inlay.use(model, "top")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cache = cached_trunk(model, rows, len(rows), Path(folder, "trunk"))
        filled = time.perf_counter() - began
        assert isinstance(cache, TrunkCache), cache
        print(cache)
        found = measured(model, cache, batches(rows), given.alternations)
    result = {
        "top_cached_over_all": spread([a / c for a, _, c, _ in found]),
        "top_over_all": spread([a / t for a, t, _, _ in found]),
        "all_over_all": spread([a / b for a, _, _, b in found]),
        "examples_per_second": {
            name: round(len(rows) / statistics.median(times), 3)
            for name, times in zip(
                ("all", "top", "top_cached"), zip(*found, strict=True), strict=False
            )
        },
        "filling_examples_per_second": round(len(rows) / filled, 3),
        "cache_bytes": cache.bytes_in_memory + cache.bytes_in_file,
        "dtype": given.dtype,
        "layers": given.layers,
        "adapted": top,
        "shape": SHAPE,
        "rows": len(rows),
        "tokens": sum(len(row.input_ids) for row in rows),
        "trained_tokens": sum(sum(row.trained) for row in rows),
        "alternations": given.alternations,
        "threads": THREADS,
    }
    print(result)
    print(write("trunk_cache", result))


def real_rows(count: int) -> list[Any]:
    """Return the rows of the batches, encoded as a run encodes them."""
    run = {"model": "pocket", "data": str(REPORTS), "output": "unused", "skip_empty": True}
    run |= {"prompt": "Findings: {findings}\nImpression:", "completion": "impression"}
    config: RunConfig = load_config(None, {**run, "max_rows": 60})
    tokenizer = read_tokenizer(located("pocket", None), trust_remote_code=False)
    return encode(rows_of_run(config).train, TextReader(tokenizer), 512)[:count]


def batches(rows: list[Any]) -> list[dict[str, Tensor]]:
    """Return the microbatches, joined without padding."""
    join = Concatenated(multiple=32)
    made = [{"input_ids": list(row.input_ids), "labels": labels(row)} for row in rows]
    found = [join(made[i : i + BATCH]) for i in range(0, len(made), BATCH)]
    return [{name: x for name, x in batch.items() if name != "padding"} for batch in found]


def measured(
    model: Any, cache: TrunkCache, data: list[dict[str, Tensor]], alternations: int
) -> list[tuple[float, float, float, float]]:
    """Return the seconds of: all layers, the top, the top with the cache, and all again."""
    found: list[tuple[float, float, float, float]] = []
    for number in range(alternations + 1):
        inlay.use(model, "all")
        first = seconds(model, data)
        inlay.use(model, "top")
        top = seconds(model, data)
        with cache.reading():
            cached = seconds(model, data)
        inlay.use(model, "all")
        again = seconds(model, data)
        print(f"{first:.2f} {top:.2f} {cached:.2f} {again:.2f}", flush=True)
        if number:
            found.append((first, top, cached, again))
    return found


def seconds(model: Any, data: list[dict[str, Tensor]]) -> float:
    """Train one pass over the microbatches, an optimiser step after each, and return its time."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    start = time.perf_counter()
    for batch in data:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}


if __name__ == "__main__":
    main()
