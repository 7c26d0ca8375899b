"""What operations do that their inputs and outputs do not show: scratch memory and arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Workspace = Callable[..., int]
"""`(*arguments of an operation)` -> bytes that it allocates inside and frees when it ends."""
Flops = Callable[..., int]
"""`(*arguments of an operation)` -> floating-point operations."""


def frozen_product(
    x: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int, *rest: Any
) -> int:
    """Two operations a weight and row of x."""
    del parts, packing, rest
    return 2 * (x.numel() // x.shape[-1]) * rows * columns


def dense_weight(
    x: Tensor, parts: Sequence[Tensor], packing: str, rows: int, columns: int, *rest: Any
) -> int:
    """The weight, dequantised in x's dtype for the product."""
    del parts, packing, rest
    return rows * columns * x.element_size()


def attention_forward(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
    """Two products of every query with every key; q: (b, heads, n, d), k: (b, heads, m, d)."""
    del rest, options
    batch, heads, length, width = q.shape
    return 4 * batch * heads * length * k.shape[-2] * width


def attention_backward(g: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
    """Five products of every query with every key."""
    del g, rest, options
    return attention_forward(q, k) * 5 // 2


WORKSPACES: dict[str, Workspace] = {
    "inlay.frozen_linear": dense_weight,
    "inlay.frozen_linear_t": dense_weight,
}
"""Operation -> its scratch memory."""

FLOPS: dict[str, Flops] = {
    "inlay.frozen_linear": frozen_product,
    "inlay.frozen_linear_t": frozen_product,
    "aten._scaled_dot_product_flash_attention_for_cpu": attention_forward,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": attention_backward,
}
"""Operation -> its arithmetic, where PyTorch's own counter does not know it."""
