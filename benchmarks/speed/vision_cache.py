"""Time saved by running a frozen vision tower once a row: epochs from pixels and from the cache.

    python -m benchmarks.speed.vision_cache [--alternations 5] [--rows 8] [--side 512] [--layers 30]

One SmolVLM of the 256M's shape with random weights, LoRA on its language part, on scikit-learn's
scans of digits. Each alternation trains three epochs from the same adapter: one in which the tower
sees the pixels, one that reads what it gave (`cache_vision`), and one that sees again, whose ratio
to the first is the machine's noise. The losses of all are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)
from vision_tiny import Tiny, make_digits, save_tiny, tokenizer_of

import inlay
from benchmarks.lib.machine import THREADS, spread, write
from inlay.data.image_inputs import ImageInputs
from inlay.data.image_reader import image_reader
from inlay.data.tokens import Encoded, encode
from inlay.model.fast.padding import length_multiple
from inlay.tasks.config import load_config
from inlay.train.collate import Padded, WithImages, labels
from inlay.train.features.vision import VisionCache, cached_vision
from inlay.train.planning import model_loss
from inlay.train.rows import rows_of_run

BATCH, SCALE = 2, 4
TOWER = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "patch_size": 16,
}  # fmt: skip
LANGUAGE = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
}  # fmt: skip


def smolvlm(side: int, layers: int) -> Tiny:
    """Return a SmolVLM for images of this side, in pixels."""
    tokenizer = tokenizer_of("smolvlm")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    text = LANGUAGE | ids | {"num_hidden_layers": layers, "vocab_size": len(tokenizer)}
    config = SmolVLMConfig(
        vision_config=TOWER | {"image_size": side},
        text_config=text | {"bos_token_id": None},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SCALE,
    )
    size = {"longest_edge": side}
    images = SmolVLMImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    tokens = (side // TOWER["patch_size"] // SCALE) ** 2
    return Tiny(
        config, SmolVLMForConditionalGeneration, images, tokenizer, {"image_seq_len": tokens}
    )


def main() -> None:
    """Measure, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--layers", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_tiny(smolvlm(given.side, given.layers), "smolvlm", folder / "model")
        data = make_digits(folder, given.rows)
        model: Any = inlay.load(str(folder / "model"))[0]
        inlay.attach(model, inlay.LoRA(rank=16), targets="language")
        run = {"model": "unused", "data": str(data), "output": "unused", "split": [1.0, 0.0, 0.0]}
        reader = image_reader(folder / "model", None)
        rows = encode(rows_of_run(load_config(None, run)).train, reader, 512)
        began = time.perf_counter()
        cache = cached_vision(model, reader, rows, folder / "kept")
        filling = time.perf_counter() - began
        assert isinstance(cache, VisionCache), cache
        multiple = length_multiple(model)
        seen = Seen(rows, ImageInputs(reader, model.dtype), multiple)
        read = Seen(rows, cache, multiple)
        turns = list(alternations(model, cache, seen, read, given.alternations))
    losses = [epoch[1] for turn in turns for epoch in turn]
    seconds = list(zip(*([epoch[0] for epoch in turn] for turn in turns), strict=True))
    result = {
        "seen_over_read": spread([a / b for a, b in zip(seconds[0], seconds[1], strict=True)]),
        "seen_over_seen": spread([a / b for a, b in zip(seconds[0], seconds[2], strict=True)]),
        "epoch_seconds": {
            name: spread(times)
            for name, times in zip(("seen", "read", "again"), seconds, strict=True)
        },
        "filling_seconds": round(filling, 3),
        "largest_loss_difference": max(
            abs(a - b) for each in losses for a, b in zip(each, losses[0], strict=True)
        ),
        "losses": losses[0],
        "tower": TOWER,
        "language": LANGUAGE,
        **{name: getattr(given, name) for name in ("rows", "side", "layers", "alternations")},
        "batch": BATCH,
        "tokens": sum(len(row.input_ids) for row in rows),
        "threads": THREADS,
    }
    print(json.dumps(result))
    print(write("vision_cache", result))


class Seen:
    """Rows with images, batched as a supervised run does."""

    def __init__(self, rows: list[Encoded], inputs: ImageInputs, multiple: int) -> None:
        self.rows, self.inputs = rows, inputs
        self.collate = WithImages(Padded(multiple), self.images)

    def images(self, numbers: Sequence[int], batch: dict[str, Any]) -> dict[str, Any]:
        """Return what the model sees of some rows."""
        chosen = [self.rows[number] for number in numbers]
        return self.inputs(chosen, width=batch["input_ids"].shape[1])

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return some rows as one batch."""
        chosen = [(n, self.rows[n]) for n in numbers]
        return self.collate(
            [{"row": n, "input_ids": row.input_ids, "labels": labels(row)} for n, row in chosen]
        )


Epoch = tuple[float, list[float]]
"""The seconds of an epoch, and the loss of each step."""


def alternations(
    model: Any, cache: VisionCache, seen: Seen, read: Seen, count: int
) -> Iterator[tuple[Epoch, Epoch, Epoch]]:
    """Yield epochs from pixels, from the cache, and from pixels again, after a warm-up."""
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for number in range(count + 1):
        set_back(model, start)
        first = epoch(model, seen)
        set_back(model, start)
        with cache.reading():
            kept = epoch(model, read)
        set_back(model, start)
        again = epoch(model, seen)
        print(f"{first[0]:.2f} {kept[0]:.2f} {again[0]:.2f}", flush=True)
        if number:
            yield first, kept, again


def set_back(model: Any, start: dict[str, torch.Tensor]) -> None:
    """Restore the adapter's first values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])


def epoch(model: Any, rows: Seen) -> Epoch:
    """Train one epoch, an optimiser step after each batch; return its time and losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses: list[float] = []
    began = time.perf_counter()
    for first in range(0, len(rows.rows), BATCH):
        batch = rows.batch(range(first, min(first + BATCH, len(rows.rows))))
        loss = model_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return time.perf_counter() - began, losses


if __name__ == "__main__":
    main()
