"""BitFit: b' = b + db, every bias and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from inlay.methods.base import SelectMethod


@dataclass(frozen=True, kw_only=True)
class BitFit(SelectMethod):
    """Train every bias vector of the model, and nothing else.

    As many parameters as the biases have. A model without biases (Llama) has nothing to train.
    Its learning rate is 3 times LoRA's.
    Paper: arXiv 2106.10199.

    >>> [BitFit().selects(nn.Linear(2, 2), name) for name in ("weight", "bias")]
    [False, True]
    """

    name = "bitfit"
    paper = "2106.10199"
    learning_rate_factor = 3.0

    def selects(self, module: nn.Module, parameter: str) -> bool:
        return parameter.endswith("bias")
