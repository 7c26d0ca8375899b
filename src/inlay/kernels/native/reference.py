"""The native kernels' steps in torch, in the same rounding order: for other devices and dtypes."""

from __future__ import annotations

from typing import NamedTuple

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


class LossSums(NamedTuple):
    """Sums over each row's logits in the first parts of the vocabulary; all (m,)."""

    highest: Tensor
    """The highest logit; fp32."""
    at_label: Tensor
    """The label's logit; fp32."""
    total: Tensor
    """Sum of exp(logit - highest) without the label's; fp64."""
    weighted: Tensor
    """Sum of exp(logit - highest) (logit - highest) without the label's; fp64."""

    @classmethod
    def start(cls, rows: int) -> LossSums:
        highest, at_label = torch.full((2, rows), -torch.inf).unbind()
        return cls(highest, at_label, *torch.zeros(2, rows, dtype=torch.float64).unbind())


@torch.no_grad()
def loss_part(logits: Tensor, labels: Tensor, first: int, sums: LossSums, out: Tensor) -> Tensor:
    """Add a part of the vocabulary to each row's sums; out: exp(logit - highest) but the label's.

    Returns what the earlier parts' terms are to be multiplied by, as the highest logit may be
    another; (m,).
    """
    here = ((labels >= first) & (labels < first + logits.shape[1])).nonzero().squeeze(1)
    at = labels[here] - first
    before = sums.highest.clone()
    sums.highest.copy_(torch.maximum(before, logits.amax(1)))
    sums.at_label[here] = logits[here, at].float()
    distance = (logits - sums.highest[:, None]).index_put_((here, at), torch.tensor(-torch.inf))
    terms = distance.exp()
    out.copy_(terms)
    begun = before != -torch.inf
    fall = torch.where(begun, before - sums.highest, 0.0).double()
    scale = torch.where(begun, fall.exp(), 0.0)
    weighted = torch.where(terms > 0, terms * distance, terms).double().sum(1)
    sums.weighted.add_(fall * sums.total).mul_(scale).add_(weighted)
    sums.total.mul_(scale).add_(terms.double().sum(1))
    return scale.float()


@torch.no_grad()
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised rows and their fp32 rstd, as transformers' LlamaRMSNorm rounds."""
    full = x.float()
    rstd = torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (full * rstd).to(x.dtype), rstd.squeeze(-1)


@torch.no_grad()
def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    scaled, full, r = (g * weight).float(), x.float(), rstd.unsqueeze(-1)
    slope = (scaled * full).mean(-1, keepdim=True) * r**3
    return (scaled * r - full * slope).to(x.dtype)


@torch.no_grad()
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@torch.no_grad()
def silu_gate_backward(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and the product again."""
    act = F.silu(gate)
    g_gate = torch.ops.aten.silu_backward(g * up, gate)
    return g_gate, g * act, act * up
