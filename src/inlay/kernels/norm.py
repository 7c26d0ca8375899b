"""RMS norm as one opaque operator that keeps its input, and nothing wider, for the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS_AT_ONCE = 1 << 18
"""Elements normalised at once on a CPU, so that what lies between stays in the cache."""


def wide(x: Tensor) -> Tensor:
    """Return x in float32, as transformers' norms compute, whatever x is."""
    return x.to(torch.float32)


@torch.library.custom_op("inlay::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))`, the quotient rounded to x's dtype first."""
    y = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
    for part, out in zip(pieces(x), pieces(y), strict=True):
        full = wide(part)
        root = torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)
        torch.mul((full * root).to(x.dtype), weight, out=out)
    return y


@torch.library.custom_op("inlay::rms_norm_backward", mutates_args=())
def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gradient to x: `r (gw - n mean(gw n))`, n = r x, r the reciprocal root."""
    back = torch.empty_like(x)
    for grad, part, out in zip(pieces(g), pieces(x), pieces(back), strict=True):
        normed, scaled = wide(part), wide(grad) * wide(weight)
        root = torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
        normed = normed * root
        scaled -= normed * (scaled * normed).mean(-1, keepdim=True)
        out.copy_(scaled.mul_(root))
    return back


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Return x's rows, some at a time on a CPU; views of a contiguous x."""
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type != "cpu":
        return (rows,)
    return rows.split(max(1, ROWS_AT_ONCE // x.shape[-1]))


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)


@rms_norm_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the input and the weight."""
    del output
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def gradient(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    """Return the gradient to x; the weight is frozen."""
    return rms_norm_backward(g, *ctx.saved_tensors, ctx.eps), None, None


rms_norm.register_autograd(gradient, setup_context=keep)
