"""Norm tuning: g' = g + dg (and b' = b + db) in every normalisation layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from inlay.methods.base import Kind, SelectMethod


@dataclass(frozen=True, kw_only=True)
class NormTuning(SelectMethod):
    """Train the gains and biases of the normalisation layers, and nothing else.

    A layer of another kind that targets name itself trains whole, as in HF PEFT.
    As many parameters as those layers have: their own width each, twice with biases.
    Its learning rate is 3 times LoRA's.
    Paper: arXiv 2312.11420.

    >>> [NormTuning().selects(module, "bias") for module in (nn.LayerNorm(4), nn.Linear(4, 4))]
    [True, False]
    """

    name = "norms"
    paper = "2312.11420"
    learning_rate_factor = 3.0
    peft_type = "LN_TUNING"
    takes_named_whole = True

    def selects(self, module: nn.Module, parameter: str) -> bool:
        return "norm" in type(module).__name__.lower() and parameter in ("weight", "bias")

    def peft_tensors(self, kind: Kind) -> Mapping[str, str]:
        return {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}
