"""The tensors' own heap: nothing overlaps, identical steps hold equal memory, as a plan has it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from inlay.kernels.native import allocator

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or allocator.tensor_heap() is None,
    reason="the heap for tensors is built on Linux, with a C++ compiler",
)


def printed(code: str, **env: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


RANDOM_BLOCKS = """
import random, torch
from inlay.kernels.native import allocator
from inlay.memory.heap import Heap

assert allocator.keep_memory() is None
kept = allocator.tensor_heap().inlay_kept_bytes
kept.restype = allocator.ctypes.c_int64
heap, held, equal, whole = Heap(keeps=True), {}, [], []
draw = random.Random(SEED)
for number in range(1, 4000):
    if held and draw.random() < 0.5:
        old = draw.choice(list(held))
        block = held.pop(old)
        whole.append(bool((block.numpy() == old % 251).all()))
        heap.free(old)
        del block
    else:
        size = int(4096 * 2 ** draw.uniform(0, 9))
        held[number] = torch.full((size,), number % 251, dtype=torch.uint8)
        heap.allocate(number, size)
    equal.append(kept() == heap.touched)
print(all(equal), all(whole), heap.touched > 0)"""


@pytest.mark.parametrize("seed", range(3))
def test_blocks_lie_where_the_plan_has_them_and_never_overlap(seed: int) -> None:
    assert printed(RANDOM_BLOCKS.replace("SEED", str(seed))) == "True True True"


STEPS = """
import torch
from inlay.kernels.native import allocator

kept = allocator.tensor_heap().inlay_kept_bytes
kept.restype = allocator.ctypes.c_int64
def step():
    saved = [torch.ones(n, 4000) @ torch.ones(4000, 700) for n in range(100, 140)]
    return sum(float(x.sum()) for x in saved)
assert allocator.keep_memory() is None
step()
held = [(step(), kept())[1] for _ in range(5)]
print(len(set(held)), held[0] > 40 * 100 * 700 * 4)
before = kept()
allocator.return_free_memory()
print(kept() < before / 10)"""


def test_equal_steps_hold_equal_memory() -> None:
    assert printed(STEPS) == "1 True\nTrue"


FORKED = """
import torch
from torch.utils.data import DataLoader
from inlay.kernels.native import keep_memory

assert keep_memory() is None
kept = torch.ones(1 << 20)
rows = [torch.full((1 << 16,), float(i)) for i in range(16)]
loader = DataLoader(rows, batch_size=4, num_workers=2, multiprocessing_context="fork")
print([float(batch[:, 0].sum()) for batch in loader], float(kept.sum()) == 1 << 20)"""


def test_forked_workers_allocate_too() -> None:
    assert printed(FORKED) == "[6.0, 22.0, 38.0, 54.0] True"


GIVEN_BACK = """
import torch
from inlay.kernels.native import keep_memory, release_memory
assert keep_memory() is None
assert keep_memory() is None
held = torch.arange(1 << 20)
grown = torch.ones(1 << 20).resize_(1 << 21)
assert release_memory() is None
print(int(held.sum()), grown.numel(), float(grown[: 1 << 20].sum()))
del held, grown
assert keep_memory() is None
print(float(torch.ones(1 << 20).sum()))"""


def test_tensors_outlive_the_switch() -> None:
    total = (1 << 20) * ((1 << 20) - 1) // 2
    assert printed(GIVEN_BACK) == f"{total} {1 << 21} {float(1 << 20)}\n{float(1 << 20)}"


@pytest.mark.parametrize("env", [{"CXX": "false"}, {"INLAY_NATIVE": "0"}])
def test_without_the_heap_glibc_keeps_what_is_freed(tmp_path: Path, env: dict[str, str]) -> None:
    code = """
from inlay.kernels.native import allocator
print(allocator.tensor_heap(), allocator.keep_memory(), allocator.release_memory())"""
    assert printed(code, XDG_CACHE_HOME=str(tmp_path), **env) == "None None None"
