"""DoRA: W' = m * (W + s B A) / ||W + s B A||_row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.methods.base import (
    Kind,
    LowRank,
    Params,
    kaiming_uniform,
    project,
    stored,
    without_autocast,
    zeros,
)
from inlay.storage.base import FrozenLinear


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRank):
    """Low-rank change of direction beside a trained row norm: `W' = m * V / ||V||_row`.

    `V = W + s B A`, `s = alpha / rank` (rsLoRA: `alpha / sqrt(rank)`); the norm is a constant in
    the gradient (section 4.3 of the paper). Shapes: A (rank, in), B (out, rank), m (out,);
    r(in + out) + out parameters a layer. A starts uniform, B zero, m as the row norms of W.
    Its norms come from W, so it must be the first of several active adapters.
    Paper: arXiv 2402.09353.

    Raises:
        AdapterError: rank or alpha not positive, dropout outside [0, 1).

    >>> DoRA(rank=8, alpha=16).count((64, 32))
    832
    """

    name = "dora"
    paper = "2402.09353"
    reads_base = True
    peft_fixed = {"use_dora": True}

    def init(self, base: FrozenLinear, kind: Kind, seed: torch.Generator) -> Params:
        out, width = base.shape
        norms = norms_of(base)
        a = kaiming_uniform(base, self.rank, width, seed)
        trained = {"A": a, "B": zeros(base, out, self.rank), "magnitude": norms}
        return Params(trained, derived={"base_norms": norms.clone()})

    def follow(self, p: Params, base: FrozenLinear, restart: bool) -> None:
        now = norms_of(base)
        changes_nothing = restart and not now.is_meta and untrained(p)
        p.register_buffer("base_norms", now, persistent=False)
        if changes_nothing:
            p.magnitude.copy_(now)

    def count(self, shape: tuple[int, int]) -> int:
        return self.rank * sum(shape) + shape[0]

    def weight(self, p: Params, w: Tensor) -> Tensor:
        v = w + self.scale * (p.B @ p.A).to(w.dtype)
        wide = torch.promote_types(p.A.dtype, v.dtype)
        norms = torch.linalg.vector_norm(v.detach(), dim=-1, dtype=wide)
        norms = norms.clamp_min(torch.finfo(wide).tiny ** 0.5)  # a row of zeros stays one
        return factors(p, norms).to(w.dtype)[..., None] * v

    def forward(self, p: Params, x: Tensor, base: FrozenLinear, training: bool) -> Tensor:
        wx = base.matmul(x)
        factor = factors(p, self.row_norms(p, base)).to(wx.dtype)
        scaled = self.scale * p.B
        if training and self.drops(x):
            dropped = F.dropout(x, self.dropout)
            low_rank = F.linear(project(dropped, p.A), scaled.to(wx.dtype))
            y = wx + (factor - 1) * base.matmul(dropped) + factor * low_rank
        else:
            inner = project(x, p.A, base.padding).to(wx.dtype)
            y = factor * (wx + F.linear(inner, scaled.to(wx.dtype)))
        return y if base.bias is None else y + base.bias.to(y.dtype)

    @torch.no_grad()
    @without_autocast
    def row_norms(self, p: Params, base: FrozenLinear) -> Tensor:
        """`||W + s B A||` of every row, (out,), from W's own norms and products of rank size."""
        wa = base.matmul(p.A.to(base.dtype)).T.to(p.A.dtype)
        crossed = (wa * p.B).sum(1)
        squared = ((p.B @ (p.A @ p.A.T)) * p.B).sum(1)
        total = p.base_norms**2 + 2 * self.scale * crossed + self.scale**2 * squared
        return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()

    def peft_tensors(self, kind: Kind) -> Mapping[str, str]:
        return {**super().peft_tensors(kind), "magnitude": "lora_magnitude_vector"}


def norms_of(base: FrozenLinear) -> Tensor:
    """Return `||W||` of every row, (out,), in the dtype that adapters are stored in."""
    return torch.linalg.vector_norm(base.dequantize(), dim=1, dtype=stored(base, 0).dtype)


def factors(p: Params, norms: Tensor) -> Tensor:
    """Return what each row is multiplied by, the norms as exact as the magnitudes are held.

    Magnitudes in halves are rounded norms: with exact ones an untrained DoRA would change W.
    """
    if p.magnitude.dtype.itemsize >= norms.dtype.itemsize:
        return p.magnitude / norms
    rounded = norms.to(p.magnitude.dtype).to(norms.dtype)
    return p.magnitude.to(norms.dtype) / rounded.clamp_min(torch.finfo(norms.dtype).tiny ** 0.5)


def untrained(p: Params) -> bool:
    """Return whether the update is zero and the magnitudes are still the norms of W."""
    return not bool(p.B.any()) and torch.equal(p.magnitude, p.base_norms.to(p.magnitude.dtype))
