"""A model that is asked for each token's log-probability, by its own output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.loss import IGNORED
from inlay.model.fast.causal_lm import FastCausalLM, ScoredOutput, scores_of


@dataclass(frozen=True)
class Scoring:
    """A model that is asked for each token's log-probability, by its own output head.

    TRL's head reads `lm_head.weight`, past an adapter or a quantised storage. A mixture of experts
    that is asked for its router's logits gives the loss that balances them, too.
    """

    model: Any
    temperature: float = 1.0
    """What the logits are divided by, as TRL's head was told too."""

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **call: Any) -> ScoredOutput:
        """Return the log-probability of each labelled token from its predecessor, (n, length-1)."""
        if isinstance(self.model, FastCausalLM) and self.model.answers_fused():
            found = self.model(**call, labels=labels, fused_lm_head=fused_lm_head)
        else:
            outputs = self.model(**call)
            found = scored(outputs.logits, labels, self.temperature)
            found.aux_loss = getattr(outputs, "aux_loss", None)
        assert found.log_probs is not None
        if found.mean_logits is None:
            found.mean_logits = torch.zeros_like(found.log_probs)
        return found


def scored(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> ScoredOutput:
    """Return scores from logits, zero where a token is not labelled."""
    wanted = labels[:, 1:]
    mask = wanted != IGNORED
    scores = scores_of(logits[:, :-1][mask], wanted[mask], temperature)
    spread = [each.new_zeros(mask.shape).masked_scatter(mask, each) for each in scores]
    return ScoredOutput(log_probs=spread[0], entropy=spread[1], is_top1=spread[2])
