"""The GPU kernels one by one, against the bytes they must move and what they replace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import random_nf4
from inlay.kernels.gpu import fp8, nf4
from inlay.storage.nf4_blocks import quantiles

WEIGHTS = {
    "8B k": (1024, 4096),
    "8B q": (4096, 4096),
    "8B gate": (14_336, 4096),
    "70B gate": (28_672, 8192),
    "70B down": (8192, 28_672),
}
COPIES = 8
"""Weights used in turn, so that none is read from the cache."""
TOKENS = 4096
PACKED_BYTES = 4.127 / 8
"""Bytes a weight, doubly quantised."""


def measured(device: str) -> list[dict[str, Any]]:
    """Return seconds, and bytes or operations a second, for every kernel and weight."""
    rows = [{"what": "copy", "bytes_per_second": copy_rate(device)}]
    for name, shape in WEIGHTS.items():
        layers = [random_nf4(*shape, torch.device(device)) for _ in range(COPIES)]
        rows += [{"weight": name, **row} for row in of_weight(layers)]
    return rows


def of_weight(layers: list[Any]) -> list[dict[str, Any]]:
    """Measure one shape."""
    out, columns = layers[0].shape
    size, device = out * columns, layers[0].device
    table, parts = quantiles(device), [layer.parts() for layer in layers]
    dense = torch.empty(out, columns, dtype=torch.bfloat16, device=device)
    x = torch.randn(TOKENS, columns, dtype=torch.bfloat16, device=device)
    g = torch.randn(TOKENS, out, dtype=torch.bfloat16, device=device)
    few = {n: x[:n].contiguous() for n in (1, 4, 16)}
    calls: dict[str, Callable[[int], object]] = {
        "dequantise": lambda i: nf4.dequantize(parts[i], table, dense, 0),
        f"bf16 product, {TOKENS} rows": lambda i: x @ dense.t(),
        f"fp8 product, {TOKENS} rows": lambda i: fp8.times(x, parts[i], table, out),
        f"fp8 product back, {TOKENS} rows": lambda i: fp8.times_t(g, parts[i], table, columns),
    }
    for n, x_few in few.items():
        calls[f"packed product, {n} rows"] = partial(packed_product, x_few, parts, table, out)
    return [{"what": name, **rated(name, seconds_of(call), size)} for name, call in calls.items()]


def packed_product(x: Tensor, parts: list[list[Tensor]], table: Tensor, out: int, i: int) -> object:
    """Multiply few rows by one of the weights."""
    return nf4.matmul(x, parts[i], table, out)


def rated(name: str, seconds: float, size: int) -> dict[str, float]:
    """Return seconds with the operations or the bytes of a second, whichever bounds the kernel."""
    if str(TOKENS) in name:
        return {"seconds": seconds, "flops_per_second": 2 * TOKENS * size / seconds}
    moved = size * (PACKED_BYTES + (2 if name == "dequantise" else 0))
    return {"seconds": seconds, "bytes_per_second": moved / seconds}


def seconds_of(call: Callable[[int], object], repeats: int = 5) -> float:
    """Return the median time of a call over rounds of all weights, by device events."""
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(COPIES):
            call(i)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / COPIES)
    return sorted(times[2:])[repeats // 2]


def copy_rate(device: str) -> float:
    """Return the bytes read plus written a second in a large copy."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda i: target.copy_(source))
