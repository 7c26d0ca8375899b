"""`act(gate) * up` as one opaque operator that keeps gate and up alone for the gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh")
AT_ONCE = 1 << 18


def activated(gate: Tensor, act: str) -> Tensor:
    """Return the activation of gate, in its dtype."""
    return F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")


@torch.library.custom_op("inlay::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`; act is `silu` or `gelu_tanh`."""
    return activated(gate, act).mul_(up)


@torch.library.custom_op("inlay::gated_backward", mutates_args=())
def gated_backward(g: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Return the gradients to gate and up; the activation is computed again."""
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    for grad, one, other, out_gate, out_up in zip(
        *(flat(t) for t in (g, gate, up, to_gate, to_up)), strict=True
    ):
        torch.mul(grad, activated(one, act), out=out_up)
        through = grad * other
        if act == "silu":
            out_gate.copy_(torch.ops.aten.silu_backward(through, one))
        else:
            out_gate.copy_(torch.ops.aten.gelu_backward(through, one, approximate="tanh"))
    return to_gate, to_up


def flat(x: Tensor) -> tuple[Tensor, ...]:
    """Return x's elements, some at a time on a CPU; views of a contiguous x."""
    elements = x.reshape(-1)
    return (elements,) if x.device.type != "cpu" else elements.split(AT_ONCE)


@gated.register_fake
def _(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return torch.empty_like(gate)


@gated_backward.register_fake
def _(g: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep gate and up."""
    del output
    gate, up, ctx.act = inputs
    ctx.save_for_backward(gate, up)


def gradient(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
    """Return the gradients to gate and up."""
    return *gated_backward(g, *ctx.saved_tensors, ctx.act), None


gated.register_autograd(gradient, setup_context=keep)
