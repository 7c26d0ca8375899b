"""Rotary position embedding as one opaque operator that keeps the angles alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.opaque import operator


@operator("rotary")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Return `x cos + rotate_half(x) sin`, or the transpose of that rotation.

    x: (b, heads, s, d); cos, sin: (b or 1, s, d).
    """
    return native.rotary(x, cos, sin, inverse)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the angles."""
    del output
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def gradient(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
    """Return the gradient to x: rotated back."""
    return rotary(g, *ctx.saved_tensors, not ctx.inverse), None, None, None


rotary.register_autograd(gradient, setup_context=keep)
