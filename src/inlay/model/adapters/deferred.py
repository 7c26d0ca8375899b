"""Adapters created on the meta device, whose values come later, from a state or a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from inlay.errors import AdapterError
from inlay.methods.base import Params, WeightMethod
from inlay.model.adapters.places import module_at, view_at
from inlay.model.adapters.registry import active, adapter_places, adapter_tensors, required_registry


def deferred(model: nn.Module, name: str) -> Iterator[tuple[str, Params, str]]:
    """Yield an adapter's tensors of weight methods, other than copies of the layer's own."""
    for place, params, method, _ in adapter_tensors(model, name):
        module, parameter = module_at(model, place)
        own = () if parameter else module._parameters
        for tensor in params._parameters if isinstance(method, WeightMethod) else ():
            if tensor not in own:
                yield place, params, tensor


@torch.no_grad()
def defer(model: nn.Module, name: str) -> None:
    """Move a new adapter's tensors to the meta device; copies of base parameters stay."""
    for _, params, tensor in list(deferred(model, name)):
        move(params, tensor, torch.device("meta"))
    registry = required_registry(model)
    if registry.refusal is None:
        registry.refusal = model.register_forward_pre_hook(refuse)


@torch.no_grad()
def allocate(model: nn.Module, name: str) -> None:
    for place, params, tensor in list(deferred(model, name)):
        view, held = view_at(model, place), params._parameters[tensor]
        if held is not None and held.is_meta and view is not None:
            move(params, tensor, view.device)
    registry = required_registry(model)
    if registry.refusal and not any(lacks_values(model, each) for each in registry.adapters):
        registry.refusal.remove()
        registry.refusal = None


def lacks_values(model: nn.Module, name: str) -> bool:
    places = adapter_places(model, name)
    return any(p.is_meta for _, params in places for p in params.parameters())


def refuse(model: nn.Module, args: Any) -> None:
    del args
    check_values(model, active(model))


def check_values(model: nn.Module, names: Iterable[str]) -> None:
    refusal = required_registry(model).refusal
    empty = [name for name in names if lacks_values(model, name)] if refusal else []
    if empty:
        raise AdapterError(
            f"adapter {empty[0]!r} has no values yet, as low_cpu_mem_usage=True makes it; load "
            "values into it, or make it without low_cpu_mem_usage"
        )


def move(params: Params, tensor: str, device: torch.device) -> None:
    old = params._parameters[tensor]
    assert old is not None
    empty = torch.empty_like(old, device=device)
    params._parameters[tensor] = nn.Parameter(empty, old.requires_grad)
