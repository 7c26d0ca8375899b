"""Full fine-tuning: W' = W + dW, every parameter, the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from inlay.methods.base import SelectMethod


@dataclass(frozen=True, kw_only=True)
class Full(SelectMethod):
    """Train every parameter of the model: the baseline that every report compares with.

    As many parameters as the model has, tied ones once; dense weights only. The base stays beside
    the trained copies, so that it can be compared with and come back.
    Its learning rate is a tenth of LoRA's.
    Paper: the comparison with LoRA is in arXiv 2405.09673.

    >>> Full().selects(nn.Linear(2, 2), "weight")
    True
    """

    name = "full"
    paper = "2405.09673"
    learning_rate_factor = 0.1

    def selects(self, module: nn.Module, parameter: str) -> bool:
        return True
