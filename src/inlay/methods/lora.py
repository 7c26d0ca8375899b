"""LoRA: W' = W + (alpha / r) B A."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.methods.base import Kind, LowRank, Params, kaiming_uniform, project, zeros
from inlay.storage.base import FrozenLinear


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """Low-rank adaptation: `W' = W + s B A`, `s = alpha / rank` (rsLoRA: `alpha / sqrt(rank)`).

    Shapes: A (rank, in), B (out, rank); r(in + out) parameters a layer. A starts uniform, B zero.
    `bias_training` also trains the adapted layers' biases (`lora_only`) or all the model's (`all`).
    Patterns map a layer-name suffix or regex to its own rank or alpha.
    Paper: arXiv 2106.09685; rsLoRA 2312.03732.

    Raises:
        AdapterError: rank or alpha not positive, dropout outside [0, 1).

    >>> LoRA(rank=8, alpha=16).count((64, 32))
    768
    """

    name = "lora"
    paper = "2106.09685"

    def init(self, base: FrozenLinear, kind: Kind, seed: torch.Generator) -> Params:
        out, width = base.shape
        a = kaiming_uniform(base, self.rank, width, seed)
        return Params({"A": a, "B": zeros(base, out, self.rank)})

    def count(self, shape: tuple[int, int]) -> int:
        return self.rank * sum(shape)

    def weight(self, p: Params, w: Tensor) -> Tensor:
        return w + self.scale * (p.B @ p.A).to(w.dtype)

    def forward(self, p: Params, x: Tensor, base: FrozenLinear, training: bool) -> Tensor:
        if x.is_floating_point() and not (training and self.drops(x)):
            return base.low_rank_linear(x, p.A, p.B, self.scale)
        y = base.linear(x)
        dropped = F.dropout(x, self.dropout, training) if self.drops(x) else x
        inner = project(dropped, p.A, base.padding)
        return y + F.linear(inner.to(y.dtype), (self.scale * p.B).to(y.dtype))
