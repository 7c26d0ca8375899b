"""LoRA: W' = W + (alpha / r) B A."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.errors import AdapterError
from inlay.methods.base import (
    Biases,
    Kind,
    Params,
    SelectMethod,
    WeightMethod,
    checked_positive,
    checked_probability,
    kaiming_uniform,
    matched,
    project,
    replaced,
    zeros,
)
from inlay.storage.base import FrozenLinear


@dataclass(frozen=True, kw_only=True)
class LoRA(WeightMethod):
    """Low-rank adaptation: `W' = W + s B A`, `s = alpha / rank` (rsLoRA: `alpha / sqrt(rank)`).

    Shapes: A (rank, in), B (out, rank); r(in + out) parameters a layer. A starts uniform, B zero.
    `bias` also trains the adapted layers' biases (`lora_only`) or all the model's (`all`).
    Patterns map a layer-name suffix or regex to its own rank or alpha.
    Paper: arXiv 2106.09685; rsLoRA 2312.03732.

    Raises:
        AdapterError: rank or alpha not positive, dropout outside [0, 1).

    >>> LoRA(rank=8, alpha=16).count((64, 32))
    768
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    rslora: bool = False
    bias_training: Literal["none", "lora_only", "all"] = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    name = "lora"
    paper = "2106.09685"
    kinds = ("linear", "conv1d", "embedding")
    peft_type = "LORA"
    peft_keys = {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "rslora": "use_rslora",
        "bias_training": "bias",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    }

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            checked_positive(rank, "rank")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            checked_positive(alpha, "alpha")
        checked_probability(self.dropout, "dropout")
        if self.bias_training not in ("none", "lora_only", "all"):
            raise AdapterError(
                f"bias must be 'none', 'lora_only' or 'all', not {self.bias_training!r}"
            )

    @property
    def scale(self) -> float:
        """`alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def also_selects(self) -> tuple[SelectMethod, ...]:
        biases = Biases(adapted_layers_only=self.bias_training == "lora_only")
        return () if self.bias_training == "none" else (biases,)

    def for_layer(self, layer_name: str) -> LoRA:
        rank = matched(self.rank_pattern, layer_name, self.rank)
        alpha = matched(self.alpha_pattern, layer_name, self.alpha)
        layer = replaced(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})
        assert isinstance(layer, LoRA)
        return layer

    def init(self, base: FrozenLinear, kind: Kind, seed: torch.Generator) -> Params:
        out, width = base.shape
        a = kaiming_uniform(base, self.rank, width, seed)
        return Params({"A": a, "B": zeros(base, out, self.rank)})

    def count(self, shape: tuple[int, int]) -> int:
        return self.rank * sum(shape)

    def weight(self, p: Params, w: Tensor) -> Tensor:
        return w + self.scale * (p.B @ p.A).to(w.dtype)

    def forward(self, p: Params, x: Tensor, base: FrozenLinear, training: bool) -> Tensor:
        y = base.linear(x)
        dropped = F.dropout(x, self.dropout, training) if self.drops(x) else x
        return y + F.linear(project(dropped, p.A).to(y.dtype), (self.scale * p.B).to(y.dtype))

    def drops(self, x: Tensor) -> bool:
        """Whether dropout applies: never to an embedding's ids."""
        return self.dropout > 0 and x.is_floating_point()

    def peft_tensors(self, kind: Kind) -> Mapping[str, str]:
        if kind == "embedding":
            return {"A": "lora_embedding_A", "B": "lora_embedding_B"}
        return {"A": "lora_A.weight", "B": "lora_B.weight"}
