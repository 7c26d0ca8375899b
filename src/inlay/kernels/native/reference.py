"""The native kernels' steps in torch, in the same rounding order: for other devices and dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows to int8; a row whose absmax has no finite reciprocal is zero to rounding."""
    full = x.float()
    absmax = full.abs().amax(1)
    steps = (127.0 / absmax).nan_to_num(nan=0.0, posinf=0.0)
    return torch.round(full * steps[:, None]).clamp(-127, 127).to(torch.int8), absmax


@torch.no_grad()
def loss_tile(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability, entropy and top-1; the logits become onehot - softmax in place."""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
    at_label = log_p.gather(1, labels[:, None])
    p = log_p.exp()
    entropy = torch.special.entr(p).sum(1)
    top1 = (at_label >= log_p.amax(1, keepdim=True)).squeeze(1)
    onehot = torch.zeros_like(p).scatter_(1, labels[:, None], 1.0)
    logits.copy_(onehot - p)
    return at_label.squeeze(1), entropy, top1


@torch.no_grad()
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised rows and their fp32 rstd, as transformers' LlamaRMSNorm rounds."""
    full = x.float()
    rstd = torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (full * rstd).to(x.dtype), rstd.squeeze(-1)


@torch.no_grad()
def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient with respect to x."""
    scaled, full, r = (g * weight).float(), x.float(), rstd.unsqueeze(-1)
    slope = (scaled * full).mean(-1, keepdim=True) * r**3
    return (scaled * r - full * slope).to(x.dtype)


@torch.no_grad()
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`."""
    return F.silu(gate) * up


@torch.no_grad()
def silu_gate_backward(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and the product again."""
    act = F.silu(gate)
    g_gate = torch.ops.aten.silu_backward(g * up, gate)
    return g_gate, g * act, act * up


@torch.no_grad()
def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Return the rotated heads, or the transpose of that rotation."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = rotate_half(x * sin, -1) if inverse else rotate_half(x, 1) * sin
    return x * cos + turned


def rotate_half(x: Tensor, sign: int) -> Tensor:
    """Return (-second half, first half), times `sign`."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first] if sign == 1 else [second, -first], -1)
