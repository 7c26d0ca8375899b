"""What TRL asks a model's fused head for, read from the forward that TRL puts on the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.kernels.frozen import frozen_linear_t
from inlay.kernels.opaque import without_autocast
from inlay.methods.base import WeightMethod
from inlay.model.adapters.layer import AdaptedLayer
from inlay.storage.registry import frozen

ANSWERED = frozenset({"log_probs", "entropy", "is_top1", "mean_logits"})
"""The per-token scores that are computed here; TRL's own head computes the rest."""
PLAIN = {"cast_lm_head_to_fp32": False, "final_logit_softcapping": None, "logit_scale": 1.0}
"""How the logits must be asked for: as the head gives them, but for a temperature."""


def asked_for(forward: Callable[..., Any] | None) -> frozenset[str] | None:
    """Return the scores that TRL's forward is to give, or None when they are not plain ones.

    >>> asked_for(None) == ANSWERED - {"mean_logits"}
    True
    """
    if forward is None:
        return ANSWERED - {"mean_logits"}
    options = options_of(forward)
    if "outputs" not in options or any(options.get(k, v) != v for k, v in PLAIN.items()):
        return None
    fields = frozenset({"log_probs", *options["outputs"]})
    return fields if fields <= ANSWERED else None


def temperature_of(forward: Callable[..., Any] | None) -> float:
    return 1.0 if forward is None else float(options_of(forward).get("temperature", 1.0))


def options_of(forward: Callable[..., Any]) -> dict[str, Any]:
    function: Any = forward
    while function is not None:
        function = getattr(function, "__func__", function)
        if inspect.isfunction(function):
            options = dict(inspect.getclosurevars(function).nonlocals)
            if "outputs" in options:
                return options
        function = getattr(function, "__wrapped__", None)
    return {}


@torch.no_grad()
@without_autocast
def mean_logits(head: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean over the vocabulary of the logits of hidden states (n, d), as (n,)."""
    if acts_on(head):
        parts = [head(part).float().mean(-1) for part in rows.split(256)]
        return torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.float32)
    matrix = frozen(head)
    wide = torch.promote_types(matrix.dtype, torch.float32)
    packed = matrix.packed()
    if packed is None:
        mean = matrix.dequantize().mean(0, dtype=wide)
    else:  # the weight is unpacked tile by tile
        ones = torch.ones(1, matrix.shape[0], dtype=wide, device=matrix.device)
        mean = frozen_linear_t(ones, *packed)[0] / matrix.shape[0]
    found = rows.to(wide) @ mean
    return found if matrix.bias is None else found + matrix.bias.to(mean.dtype).mean()


def acts_on(head: nn.Module) -> bool:
    """Return whether an adapter is active at the head, so that its weight is not all."""
    return isinstance(head, AdaptedLayer) and bool(head.active_methods())


def reads_past(head: nn.Module) -> bool:
    """Return whether the head's `weight` alone would leave an active adapter out."""
    return isinstance(head, AdaptedLayer) and any(
        isinstance(method, WeightMethod) for method, _ in head.active_methods()
    )
