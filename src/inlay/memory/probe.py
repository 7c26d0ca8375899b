"""Measured memory: the process's peak on a CPU, the allocator's on a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from inlay.kernels.native import return_free_memory
from inlay.kernels.scratch import kept
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach
from inlay.model.load.pretrained import load

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Measured:
    """The peak in bytes of a `measuring` block; None where the system does not report it."""

    peak: int | None = None


@contextmanager
def measuring(device: torch.device) -> Generator[Measured]:
    """Measure the peak memory of the `with` block, including what was held before it."""
    found = Measured()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.peak = torch.cuda.max_memory_allocated(device)
        return
    forgotten = forget_peak()
    yield found
    found.peak = status("VmHWM") if forgotten else None


def forget_peak() -> bool:
    """Reset the process's peak memory; return whether the system allows it."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def resident() -> int:
    """Return the bytes of memory that this process holds now; 0 where unknown."""
    return status("VmRSS") or 0


def status(field: str) -> int | None:
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


LATER = 49 << 20
"""Bytes that a run adds after it is planned, apart from tensors: code of the trainer and of
checkpoints, products of other lengths, and rows; from benchmarks/memory/plan_runs.py."""
CODE = 520 << 10
"""Bytes of code that PyTorch's library makes for one shape of a product in halves, and keeps."""
CODE_WITHOUT_HALVES = 3 << 19
"""Bytes of such code for one kind of product in halves, in all its lengths, on a CPU that has no
arithmetic on halves: our own operators multiply in float32 there, and the rest stays PyTorch's."""
LENGTHS = 12
"""Lengths of batches in a run, each of which gives a product another shape."""
CODE_OF_OPERATORS = 43 << 20
"""Bytes of such code for the products inside our own operators, which each length has too."""
MOST_ROWS, MOST_COLUMNS, MOST_OUTPUTS = 512, 4096, 1 << 15
"""Larger products are tried at this size: the multiplying library's buffers grow no more."""


def runtime(products: frozenset[tuple[int, int, int]]) -> int:
    """Return the bytes that this process holds besides the model: code, pools, libraries.

    The embedded model is loaded, adapted and trained for two short steps first, and products of
    these shapes (m, k, n) are tried, so that what they bring in is there; what is free is given
    back.
    """
    tried = {
        (min(m, MOST_ROWS), min(k, MOST_COLUMNS), min(n, MOST_OUTPUTS)) for m, k, n in products
    }
    widest = {shape for shape in tried if not any(covers(other, shape) for other in tried)}
    return held_after(frozenset(widest)) + LATER


def code_of_products(kinds: int) -> int:
    most = int(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") or 1024)
    return CODE_OF_OPERATORS + CODE * min(most, kinds * LENGTHS)


def covers(other: tuple[int, int, int], shape: tuple[int, int, int]) -> bool:
    """Return whether a product is at least as large as a different one in every direction."""
    return other != shape and all(a >= b for a, b in zip(other, shape, strict=True))


@cache
def held_after(products: frozenset[tuple[int, int, int]]) -> int:
    warm_up()
    for m, k, n in products:
        x, w = torch.ones(m, k), torch.ones(n, k)
        torch.mm(torch.mm(x, w.t()), w)
        del x, w
    vars(kept).clear()
    gc.collect()
    return_free_memory()
    return resident()


@cache
def warm_up() -> None:
    model, _ = load("pocket", device="cpu")
    with torch.random.fork_rng([]):
        attach(model, LoRA(rank=4)).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained)
        ids = torch.arange(32)[None]
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
