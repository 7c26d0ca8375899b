"""Stop a run that has gone wrong, before what it did is saved."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from inlay.errors import TrainingError
from inlay.methods.base import Params
from inlay.model.adapters.registry import adapter_places

TOO_HIGH = 1.5
"""A model this much worse than the untrained one, step after step, has diverged."""
STEPS_TOO_HIGH = 10
FAR_TOO_HIGH = 10.0
"""One step this much worse than the untrained model is enough."""
FIRST_STEPS = 5
"""Where no held-out loss of the untrained model is known, these steps stand for it."""

REMEDY = "lower learning_rate, raise warmup, or compute in float32"


class DivergedError(TrainingError):
    """A loss or gradient that is not finite, or a loss that explodes."""


class Guard:
    """Watches every step's loss and gradient, against the loss of the untrained model."""

    def __init__(self, reference: float | None = None) -> None:
        self.reference = reference
        self.first: list[float] = []
        self.high = 0
        """How many steps in a row the loss has been too high."""

    def check_loss(self, loss: float, step: int) -> None:
        """Raise when a loss is not finite; the optimiser has not stepped on it."""
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss became {loss} at step {step}, expected a finite number; training "
                f"stopped before that step changed the adapter: {REMEDY}"
            )

    def check_gradient(self, norm: float, step: int) -> None:
        """Raise when the gradient's norm is not finite; the optimiser has not stepped on it."""
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient's norm became {norm} at step {step}, expected a finite number; "
                f"training stopped before that step changed the adapter: {REMEDY}"
            )

    def observe(self, loss: float, step: int) -> None:
        """Take in a step's loss; raise when the model has become far worse than untrained."""
        if self.reference is None:
            self.first.append(loss)
            if len(self.first) == FIRST_STEPS:
                self.reference = sum(self.first) / FIRST_STEPS
            return
        if step == 1:  # untrained, too, and its rows may be harder than the held-out ones
            self.reference = max(self.reference, loss)
        self.high = self.high + 1 if loss > TOO_HIGH * self.reference else 0
        if self.high >= STEPS_TOO_HIGH or loss > FAR_TOO_HIGH * self.reference:
            raise DivergedError(
                f"the loss exploded: {loss:.4g} at step {step}, against {self.reference:.4g} "
                f"before training; {REMEDY}"
            )

    @property
    def suspicious(self) -> bool:
        """Whether the last loss was too high: such a state is not worth a checkpoint."""
        return self.high > 0

    def state(self) -> dict[str, object]:
        return {"reference": self.reference, "first": list(self.first), "high": self.high}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


def check_gradients(model: nn.Module, adapter: str) -> None:
    """Raise unless every place of the adapter has a tensor with a non-zero gradient.

    One tensor is enough: where LoRA's B is zero, as it is at first, A's gradient is zero too.
    """
    silent = list(without_gradient(model, adapter))
    if silent:
        shown = ", ".join(repr(name) for name in silent[:3])
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        raise TrainingError(
            f"no gradient reaches the adapter at {shown}{more}, expected one at every adapted "
            "layer in the first step: these layers take no part in the model's loss; leave them "
            "out with exclude, or choose other targets"
        )


def without_gradient(model: nn.Module, adapter: str) -> Iterator[str]:
    """Yield the places of an adapter at which every gradient is missing or zero."""
    for name, params in adapter_places(model, adapter):
        gradients = [p.grad for p in params.parameters()]
        if not any(g is not None and bool(g.any()) for g in gradients):
            yield name or "the whole model"


def fingerprints(model: nn.Module, adapter: str) -> dict[str, str]:
    """Return a hash of the trained tensors at each place of an adapter."""
    return {place: fingerprint(params) for place, params in adapter_places(model, adapter)}


def fingerprint(params: Params) -> str:
    digest = hashlib.sha256()
    for p in params.parameters():
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same(prints: Sequence[Mapping[str, str]], step: int) -> None:
    """Raise unless every process has the same fingerprints of its adapter."""
    for rank, found in enumerate(prints):
        other = [place or "the whole model" for place in found if found[place] != prints[0][place]]
        if other:
            raise TrainingError(
                f"after step {step} process {rank} holds another adapter than process 0, at "
                f"{', '.join(map(repr, other[:3]))} ({len(other)} of {len(found)} places), and "
                "every process must hold the same one: their machines or libraries differ, or one "
                "of them is broken. Resume from the last checkpoint on others"
            )


def check_changed(before: Mapping[str, str], model: nn.Module, adapter: str) -> None:
    """Raise unless training changed the adapter at every place."""
    after = fingerprints(model, adapter)
    same = [place or "the whole model" for place, value in before.items() if after[place] == value]
    if same:
        raise TrainingError(
            f"training left the adapter unchanged at {', '.join(map(repr, same[:3]))} "
            f"({len(same)} of {len(before)} places); the learning rate may be too low to move it"
        )
