"""The cost of operators beyond their inputs and outputs: scratch memory and arithmetic.

An operator of Inlay registers its own cost in its file; PyTorch's are here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.kernels.scratch import FAST_HALVES_ON_CPU, HALVES, product_dtype

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Scratch:
    """Memory that an operator holds besides its inputs and outputs."""

    passing: tuple[int, ...] = ()
    """Bytes of the blocks that are freed when the operator ends."""
    kept: int = 0
    """Bytes of the buffer that is kept from one operator to the next."""
    multiplied: tuple[int, int, int] | None = None
    """Shape (m, k, n) of the float32 products inside: the multiplying library keeps buffers for
    them."""


SCRATCH: dict[str, Callable[..., Scratch]] = {}
"""Operator -> its scratch memory, given its arguments."""
FLOPS: dict[str, Callable[..., int]] = {}
"""Operator -> its floating-point operations, where PyTorch's own counter does not know it."""

planned: DeviceKind = "cpu"
"""The kind of device that is planned for; the device of fake tensors is always `cpu`."""


@contextmanager
def planning_for(kind: DeviceKind) -> Generator[None]:
    global planned
    before, planned = planned, kind
    try:
        yield
    finally:
        planned = before


def on_cpu() -> bool:
    return planned == "cpu"


def planned_dtype(x: Tensor) -> torch.dtype:
    return product_dtype(x) if on_cpu() else x.dtype


def matmul(a: Tensor, b: Tensor) -> Scratch:
    """Scratch of `a @ b`: the result in float32, where a CPU emulates arithmetic on halves."""
    (m, k), n = a.shape, b.shape[-1]
    emulated = on_cpu() and a.dtype in HALVES and a.dtype not in FAST_HALVES_ON_CPU
    return Scratch((4 * m * n,) if emulated else (), multiplied=(m, k, n))


def addmm(bias: Tensor, a: Tensor, b: Tensor, **factors: Any) -> Scratch:
    del bias, factors
    return matmul(a, b)


def attention_forward(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
    """Two products of every query with every key; q: (b, heads, n, d), k: (b, heads, m, d)."""
    del rest, options
    batch, heads, length, width = q.shape
    return 4 * batch * heads * length * k.shape[-2] * width


def attention_backward(g: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
    """Five products of every query with every key."""
    del g, rest, options
    return attention_forward(q, k) * 5 // 2


SCRATCH.update({"aten.mm": matmul, "aten.addmm": addmm})
FLOPS.update(
    {
        "aten._scaled_dot_product_flash_attention_for_cpu": attention_forward,
        "aten._scaled_dot_product_flash_attention_for_cpu_backward": attention_backward,
    }
)
