"""RMS norm as one opaque operator that keeps its input and one number a row for the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.opaque import operator


@operator("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `weight * r x` and `r = (mean(x^2) + eps)^-1/2`, `r x` rounded to x's dtype first."""
    return native.rms_norm(x, weight, eps)


@operator("rms_norm_backward")
def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, root: Tensor) -> Tensor:
    """Return the gradient to x: `r (gw - n mean(gw n))`, n = r x."""
    return native.rms_norm_backward(g, x, weight, root)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


rms_norm_backward.register_fake(lambda g, x, weight, root: torch.empty_like(x))


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def gradient(ctx: Any, g: Tensor, unused: Tensor) -> tuple[Tensor, None, None]:
    del unused
    return rms_norm_backward(g, *ctx.saved_tensors), None, None


rms_norm.register_autograd(gradient, setup_context=keep)
