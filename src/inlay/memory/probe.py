"""What a step really held: the process's peak on a CPU, the allocator's on a GPU."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from inlay.kernels.scratch import kept
from inlay.methods.lora import LoRA
from inlay.model.attach import attach
from inlay.model.load import load

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Measured:
    """The most bytes held inside a `measuring` block; None where the system does not tell."""

    peak: int | None = None


@contextmanager
def measuring(device: torch.device) -> Generator[Measured]:
    """Measure the most memory held inside the `with` block, what was there before included."""
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
    """Set the process's peak to what it holds now; say whether the system allows it."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def resident() -> int:
    """Return the bytes of memory this process holds now; 0 where the system does not tell."""
    return status("VmRSS") or 0


def status(field: str) -> int | None:
    """Return one of the kernel's figures about this process, in bytes."""
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


@cache
def runtime() -> int:
    """Return what this process holds once it has trained anything at all: code, pools, libraries.

    The embedded model is loaded, adapted and trained for two short steps first, and matrices of
    a usual size are multiplied, so that what they bring in is there; what is free is given back.
    """
    warm_up()
    gc.collect()
    give_back()
    return resident()


def warm_up() -> None:
    """Train the embedded model for two steps on a few tokens."""
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
        for dtype in (torch.float32, torch.bfloat16):
            square = torch.ones(1024, 1024, dtype=dtype)
            torch.mm(square, square)
    vars(kept).clear()


def give_back() -> None:
    """Return free memory to the system, where the C library is glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
