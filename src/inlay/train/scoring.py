"""A model that is asked for each token's log-probability, by its own output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.model.fast.causal_lm import IGNORED, FastCausalLM, ScoredOutput


@dataclass(frozen=True)
class Scoring:
    """A model that is asked for each token's log-probability, by its own output head.

    TRL's head reads `lm_head.weight`, past an adapter or a quantised storage.
    """

    model: Any

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **call: Any) -> ScoredOutput:
        """Return the log-probability of each labelled token from its predecessor, (n, length-1)."""
        if isinstance(self.model, FastCausalLM) and self.model.takes_chunks():
            found = self.model(**call, labels=labels, fused_lm_head=fused_lm_head)
        else:
            found = scored(self.model(**call).logits, labels)
        assert found.log_probs is not None
        if found.mean_logits is None:
            found.mean_logits = torch.zeros_like(found.log_probs)
        return found


def scored(logits: Tensor, labels: Tensor) -> ScoredOutput:
    """Return scores from logits; entropy and top-1 hits, which nobody asks for, as zeros."""
    wanted = labels[:, 1:]
    mask = wanted != IGNORED
    rows = logits[:, :-1][mask]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    picked = rows.log_softmax(-1).gather(1, wanted[mask][:, None]).squeeze(1)
    log_probs = picked.new_zeros(mask.shape).masked_scatter(mask, picked)
    nothing = torch.zeros_like(log_probs)
    return ScoredOutput(log_probs=log_probs, entropy=nothing, is_top1=nothing.bool())
