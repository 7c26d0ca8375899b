"""Quantising to NF4 against bitsandbytes, and what unpacking costs in a training step.

    python -m benchmarks.speed.nf4

Quantising: the same matrix alternately, and the bytes compared. Unpacking: the 0.5B shape takes a
step of 512 tokens; then every NF4 weight is unpacked twice, through the buffers the products use,
as the forward and the backward pass do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.lib.contestants import ours_nf4
from benchmarks.lib.machine import THREADS, spread, write
from benchmarks.lib.shapes import save_base, save_start, shape_config
from benchmarks.lib.step_worker import Training
from inlay.kernels.matrix import Matrix
from inlay.storage.nf4 import NF4Linear

REPEATS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape")
    parser.add_argument("--output", default="nf4_speed", help="name in benchmarks/figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    shape, size, tokens, alternations = (
        ("tiny", 128, 32, 2) if options.smoke else ("0.5B", 4096, 512, 5)
    )
    result = {
        "threads": THREADS,
        "alternations": alternations,
        "quantise": quantise(size, alternations),
        "unpack": unpack(shape, tokens, alternations),
    }
    print(result)
    print(write(options.output, result))


def quantise(size: int, alternations: int) -> dict[str, Any]:
    """Quantise one bf16 matrix by both, double quantisation on."""
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(0)
    w = torch.randn(size, size).bfloat16()
    found: list[tuple[float, float]] = []
    for _ in range(alternations + 1):
        mine, our_seconds = fastest(lambda: NF4Linear.quantized(w, None, double_quant=True))
        theirs, their_seconds = fastest(
            lambda: quantize_4bit(w, compress_statistics=True, quant_type="nf4")
        )
        found.append((our_seconds, their_seconds))
    packed, state = theirs
    same = torch.equal(mine.weight.flatten(), packed.flatten()) and torch.equal(
        mine.absmax, state.absmax
    )
    found = found[1:]
    return {
        "size": size,
        "inlay_seconds": spread([a for a, _ in found]),
        "bitsandbytes_seconds": spread([b for _, b in found]),
        "speed": spread([b / a for a, b in found]),
        "equal_bytes": same,
    }


def fastest(action: Any) -> tuple[Any, float]:
    """Return an action's result and the shortest of a few measured times."""
    times: list[float] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = action()
        times.append(time.perf_counter() - started)
    return result, min(times)


def unpack(shape: str, tokens: int, alternations: int) -> dict[str, Any]:
    """Time a step, and the unpacking that is part of it, alternately."""
    config = shape_config(shape)
    with tempfile.TemporaryDirectory() as folder:
        base, start = Path(folder) / "base", Path(folder) / "start"
        save_base(config, base)
        save_start(base, start)
        model = ours_nf4(str(base), str(start)).train()
    spec = {"tokens": tokens, "vocab": config.vocab_size, "seed": 0, "learning_rate": 1e-3}
    training = Training(model, spec)
    pairs = [(training.step()[0], unpack_twice(model, tokens)) for _ in range(alternations + 2)]
    steps, unpacking = zip(*pairs[2:], strict=True)
    return {
        "shape": shape,
        "tokens": tokens,
        "layers": config.num_hidden_layers,
        "vocab": config.vocab_size,
        "step_seconds": spread(steps),
        "unpacking_seconds": spread(unpacking),
        "share_of_step": spread([u / s for s, u in zip(steps, unpacking, strict=True)]),
    }


def unpack_twice(model: nn.Module, tokens: int) -> float:
    """Return the seconds of unpacking every NF4 weight for a forward and a backward pass."""
    started = time.perf_counter()
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            like = torch.empty(tokens, 1, dtype=layer.dtype)
            matrix = Matrix(
                layer.parts(), NF4Linear.storage, layer.out_features, layer.in_features, like
            )
            for _ in range(2):
                for _tile in matrix.each_tile():
                    pass
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
