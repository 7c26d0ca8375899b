"""How far a merged model is from the adapted one, on inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import MergeError
from inlay.methods.base import evaluating

Batches = Sequence[Mapping[str, Tensor]]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest accepted difference of logits, as a share of the largest logit, by weight dtype."""
LEAST_EFFECT = 0.6
"""The smallest share of an adapter's effect on the outputs that a lossy merge keeps unasked.

An effect below the rounding of the outputs themselves measures about 0.5, whatever is left of it.
"""


@dataclass(frozen=True)
class Fidelity:
    """How the merged model's outputs differ from the adapted one's.

    `effect_kept` is the share of the adapter's effect that is left, `<m, a> / <a, a>`: a and m are
    what the adapter and the merge change in the outputs, as log-probabilities weighted by the
    adapted model's probabilities, where half `<a, a>` is the KL divergence of small changes.
    """

    max_logit_difference: float
    kl: float
    top1_agreement: float
    effect_kept: float
    positions: int


@torch.no_grad()
def logits_of(model: nn.Module, batches: Batches) -> list[Tensor]:
    """Return the outputs of each batch in fp64, without padding, in eval mode."""
    with evaluating(model):
        return [outputs(model, batch) for batch in batches]


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return one batch's logits as (positions, classes)."""
    logits = first_tensor(model(**batch))
    mask = batch.get("attention_mask")
    decodes = "decoder_input_ids" in batch  # The mask is of the source, the logits of the target.
    if mask is not None and not decodes and logits.dim() == 3 and logits.shape[:2] == mask.shape:
        logits = logits[mask.bool()]
    return logits.double().flatten(end_dim=-2)


def first_tensor(result: Any) -> Tensor:
    """Return a model output's logits, else its first tensor, such as hidden states."""
    if isinstance(result, Tensor):
        return result
    if "logits" in result and isinstance(result["logits"], Tensor):
        return result["logits"]
    values = list(result.values()) if isinstance(result, Mapping) else list(result)
    found = [x for x in values if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]
    if not found:
        raise MergeError("the model returns no tensor, so that a merge cannot be checked on it")
    return found[0]


def compared(
    adapted: Sequence[Tensor], base: Sequence[Tensor], merged: Sequence[Tensor]
) -> Fidelity:
    x, y, z = (torch.cat(list(each)) for each in (adapted, merged, base))
    if not bool(torch.isfinite(x).all()):
        raise MergeError(
            "the adapted model's own outputs are not finite on these inputs, so that a merge "
            "cannot be checked on them; give other inputs, or a wider dtype"
        )
    if not bool(torch.isfinite(y).all()):
        raise MergeError("the merged model gives logits that are not finite; it was left adapted")
    return Fidelity(
        max_logit_difference=float((x - y).abs().max()),
        kl=max(float(kl(x, y)), 0.0),
        top1_agreement=float((x.argmax(-1) == y.argmax(-1)).double().mean()),
        effect_kept=effect_kept(x, z, y),
        positions=x.shape[0],
    )


def kl(x: Tensor, y: Tensor) -> Tensor:
    """Return KL(x || y) in nats a position."""
    return F.kl_div(y.log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="batchmean")


def effect_kept(adapted: Tensor, base: Tensor, merged: Tensor) -> float:
    """Return the share of an adapter's effect on the outputs that a merge keeps; 1 without any.

    All (positions, classes); outputs of one class are numbers, and compared as they are.
    """
    weights = torch.ones_like(adapted)
    if adapted.shape[-1] > 1:
        adapted, base, merged = (x.log_softmax(-1) for x in (adapted, base, merged))
        weights = adapted.exp()
    effect, left = adapted - base, merged - base
    if adapted.shape[-1] > 1:
        total = weights.sum(-1, keepdim=True)
        effect, left = (x - (weights * x).sum(-1, keepdim=True) / total for x in (effect, left))
    whole = float((weights * effect * effect).sum())
    if not 0 < whole < float("inf"):
        return 1.0
    return float((weights * effect * left).sum()) / whole


def explained(found: Fidelity, before: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return found.max_logit_difference <= TOLERANCE.get(dtype, 0.1) * max(largest(before), 1.0)


def check_fidelity(found: Fidelity, before: Sequence[Tensor], dtype: torch.dtype) -> None:
    if explained(found, before, dtype):
        return
    accepted = TOLERANCE.get(dtype, 0.1) * max(largest(before), 1.0)
    raise MergeError(
        f"the merged model's logits differ from the adapted model's by up to "
        f"{found.max_logit_difference:.3g}, more than rounding in {dtype} explains "
        f"({accepted:.3g}); the model was left adapted. Merge in a wider dtype (load with "
        "dtype='float32'), or keep the adapter unmerged"
    )


def largest(logits: Sequence[Tensor]) -> float:
    return max((float(x.abs().max()) for x in logits), default=0.0)
