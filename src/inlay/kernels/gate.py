"""`act(gate) * up` as one opaque operator that keeps gate and up alone for the gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.opaque import operator


@operator("gated")
def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`; act is `silu` or `gelu_tanh`."""
    if act == "silu":
        return native.silu_gate(gate, up)
    return F.gelu(gate, approximate="tanh").mul_(up)


@operator("gated_backward")
def gated_backward(g: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Return the gradients to gate and up; the activation is computed again."""
    if act == "silu":
        return native.silu_gate_backward(g, gate, up)[:2]
    to_gate = torch.ops.aten.gelu_backward(g * up, gate, approximate="tanh")
    return to_gate, F.gelu(gate, approximate="tanh").mul_(g)


gated.register_fake(lambda gate, up, act: torch.empty_like(gate))
gated_backward.register_fake(
    lambda g, gate, up, act: (torch.empty_like(gate), torch.empty_like(up))
)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    gate, up, ctx.act = inputs
    ctx.save_for_backward(gate, up)


def gradient(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
    return *gated_backward(g, *ctx.saved_tensors, ctx.act), None


gated.register_autograd(gradient, setup_context=keep)
