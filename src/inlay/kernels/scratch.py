"""The buffer and the dtype in which a frozen weight is multiplied.

A packed weight is unpacked tile by tile into one buffer that is kept, so that nothing dense is
allocated, and a tile is still in the cache when it is multiplied. On a GPU a tile is the whole
matrix, unless that is as large as an output head, and the caching allocator keeps the buffer.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from inlay.kernels.switches import is_on

TILE_BYTES = 16 << 20
"""Measured on two cores: smaller tiles slow the product, larger tiles leave the cache."""
GPU_TILE_BYTES = 512 << 20
"""Room for every layer of a 70B model's blocks at once, and for a quarter of its output head."""
kept = threading.local()
"""Each thread's buffer; the backward pass on a GPU has a thread of its own."""


HALVES = (torch.bfloat16, torch.float16)
BELOW_HALVES = ("generic", "avx2", "avx512")
"""Values of INLAY_NATIVE that stand for a CPU without arithmetic on halves."""
WITHOUT_TILES = "avx512_bf16"
"""The value of INLAY_NATIVE that stands for a CPU with AVX512-BF16 and without AMX."""


def fast_halves_on_cpu() -> frozenset[torch.dtype]:
    """Return the half-precision dtypes in which this CPU multiplies faster than in float32.

    Intel's CPUs without AMX have none: there a step of peft in bfloat16 is slower than in float32
    (docs/performance.md). AMD's count as faster by their data sheets, and were not measured.
    """
    level = os.environ.get("INLAY_NATIVE", "").lower()
    if level in BELOW_HALVES:
        return frozenset()
    tiles = level != WITHOUT_TILES and torch.cpu._is_amx_tile_supported()
    pairs = torch.cpu._is_avx512_bf16_supported() and not made_by_intel()
    has = {
        torch.bfloat16: tiles or pairs,
        torch.float16: tiles and torch.cpu._is_amx_fp16_supported(),
    }
    return frozenset(dtype for dtype, there in has.items() if there)


def made_by_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()


FAST_HALVES_ON_CPU = fast_halves_on_cpu()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to multiply x in: its own, or float32 where that is exact and faster.

    A CPU without bfloat16 arithmetic emulates it at a fifth of float32's rate. Products of halves
    are exact in float32, and the sum is rounded once instead of often.
    """
    half = x.dtype in HALVES
    fast = x.device.type != "cpu" or x.dtype in FAST_HALVES_ON_CPU
    return torch.float32 if half and not fast and is_on("products") else x.dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`, without the call of `Tensor.to` where x has it: that call is slow."""
    return x if x.dtype == dtype else x.to(dtype)


def tile_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many rows of a (rows, columns) matrix are unpacked at once: tiles of one size."""
    if not rows:
        return rows
    room = TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    most = max(1, room // (columns * dtype.itemsize))
    return ceil(rows / ceil(rows / most))


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised (rows, columns) matrix: on a CPU, this thread's kept buffer."""
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    size = rows * columns * dtype.itemsize
    buffer: Tensor | None = getattr(kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        kept.buffer = buffer = torch.empty(max(size, TILE_BYTES), dtype=torch.uint8)
    return buffer[:size].view(dtype).view(rows, columns)


def tiles(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
