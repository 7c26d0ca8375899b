"""Merged weights of a model, which are swapped in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.adapters.layer_class import become_adapted
from inlay.model.adapters.registry import activate, adapted_layers, required_registry
from inlay.model.merge.merge import why_not_mergeable
from inlay.model.merge.plan import Update, held, takes_over
from inlay.peft.errors import MergeError
from inlay.storage.registry import frozen

Swap = tuple[nn.Module, str, Any, Any]
"""An owner, the name of its child or parameter, what is there unmerged and what merged."""


class Merged(Update):
    """A merge that can be put in place and taken out bit for bit: base tensors are kept aside."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        reason = why_not_mergeable(model, names)
        if reason is not None:
            raise MergeError(reason)
        self.model, self.names = model, tuple(names)
        self.swaps: list[Swap] = []
        self.plan()

    @torch.no_grad()
    def plan(self) -> None:
        registry = required_registry(self.model)
        before = {layer: layer.active for layer in adapted_layers(self.model)}
        activate(self.model, registry, self.names)
        try:
            for name, layer in list(self.model.named_modules()):
                if isinstance(layer, AdaptedLayer) and layer.active_methods():
                    self.layer(name, layer)
        finally:
            for layer, was_active in before.items():
                layer.active = was_active

    def layer(self, name: str, layer: AdaptedLayer) -> None:
        if layer.keeps_class or not layer.weight_methods():
            for key, own, rounded in self.changes(layer):
                self.swaps.append((layer, key, own, rounded))
            return
        assert layer.base is not None
        w, bias = layer.adapted_weight()
        new = held(layer.base, w, bias, "dense")
        self.account(layer.base.dequantize(), w, frozen(new).dequantize())
        if layer.base.storage == "dense":
            for key, value in new._parameters.items():
                if value is not None:
                    self.swaps.append((layer, key, layer._parameters[key], value))
            return
        parent, _, leaf = name.rpartition(".")
        takes_over(new, layer)
        twin = become_adapted(new.train(layer.training), frozen(new))
        twin.adapters, twin.methods = layer.adapters, layer.methods
        self.swaps.append((self.model.get_submodule(parent), leaf, layer, twin))

    def check_finite(self) -> None:
        for owner, key, _, new in self.swaps:
            held_here = [new] if isinstance(new, Tensor) else list(new.parameters(recurse=False))
            if not all(bool(torch.isfinite(each).all()) for each in held_here):
                where = next(n for n, m in self.model.named_modules() if m is owner)
                raise MergeError(
                    "NaNs detected in the merged weights. The adapter "
                    f"{', '.join(self.names)} seems to be broken: {where}.{key} is not finite "
                    "with it; nothing was merged"
                )

    def put_in(self) -> None:
        for owner, key, old, new in self.swaps:
            swap(owner, key, old, new)

    def take_out(self) -> None:
        for owner, key, old, new in self.swaps:
            swap(owner, key, new, old)


def swap(owner: nn.Module, key: str, old: Any, new: Any) -> None:
    """Replace one child or tensor; the new one gets the mode and device of the old one."""
    if isinstance(new, nn.Module):
        new.train(old.training)
        owner._modules[key] = new
        return
    if new.device != old.device:
        new.data = new.data.to(old.device)
    (owner._buffers if key in owner._buffers else owner._parameters)[key] = new
