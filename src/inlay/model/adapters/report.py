"""What an attached model trains: what matched, what did not, how much, where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from inlay.methods.base import Params, WeightMethod
from inlay.model.adapters.entries import grouped
from inlay.model.adapters.layer import dropout_of
from inlay.model.adapters.places import module_at
from inlay.model.adapters.registry import active, adapter_places, adapter_tensors, adapters, notes
from inlay.model.adapters.wrappers import looks_through
from inlay.storage.base import FrozenLinear


@dataclass(frozen=True)
class AdapterReport:
    """One adapter: where it went, what was left out, how many parameters it trains."""

    name: str
    method: str
    active: bool
    parameters: int
    matched: tuple[str, ...]
    left_out: tuple[str, ...]
    undropped: tuple[str, ...]
    """Places without the method's dropout: only the layer's own code reads the input."""
    passed_over: tuple[tuple[str, str], ...]
    """Frozen weights that are no linear layer's: their name and what they are."""


@dataclass(frozen=True)
class Report:
    """The adapters of a model; `str(report)` is a readable summary."""

    adapters: tuple[AdapterReport, ...]
    trainable: int
    total: int
    """The parameters of the whole model, active adapters included; copies count once."""
    notes: tuple[str, ...] = ()
    """Sentences about fast paths that do not run on this model."""

    @property
    def percent(self) -> float:
        """Trained parameters as a percentage of the whole model's."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.trainable:,} of {self.total:,} parameters train ({self.percent:.3g}%)"]
        for adapter in self.adapters:
            state = "active" if adapter.active else "not active"
            lines.append(f"{adapter.name}: {adapter.method}, {adapter.parameters:,} ({state})")
            lists = {
                "on": list(adapter.matched),
                "without dropout:": list(adapter.undropped),
                "left out:": list(adapter.left_out),
            }
            for name, what in adapter.passed_over:
                lists.setdefault(f"passed over ({what}):", []).append(name)
            for title, names in lists.items():
                lines += [f"  {title} {shape} ({n})" for shape, n in grouped(names).items()]
        return "\n".join([*lines, *self.notes])


@looks_through
def report(model: nn.Module) -> Report:
    """Report what the model's adapters matched, left out and train; empty for a model of none."""
    here = active(model)
    found = tuple(
        AdapterReport(
            name=name,
            method=attached.method.name,
            active=name in here,
            parameters=count_once(model, name),
            matched=attached.found.names,
            left_out=attached.found.left_out,
            undropped=tuple(undropped(model, name)),
            passed_over=attached.found.passed_over,
        )
        for name, attached in adapters(model).items()
    )
    trained, added = trained_sizes(model)
    total = base_size(model) + sum(added.values())
    return Report(found, sum(trained.values()), total, notes(model))


def undropped(model: nn.Module, name: str) -> Iterator[str]:
    """Yield the places where a method that has dropout does not apply it."""
    if not getattr(adapters(model)[name].method, "dropout", 0.0):
        return
    for place, _, method, _ in adapter_tensors(model, name):
        if isinstance(method, WeightMethod) and not dropout_of(method):
            yield place


def trained_sizes(model: nn.Module) -> tuple[dict[int, int], dict[int, int]]:
    """Return the sizes of the active adapters' trained tensors, and of those added to the model.

    By identity. A trained copy of a parameter stands in its place, so that it adds nothing.
    """
    trained: dict[int, int] = {}
    added: dict[int, int] = {}
    for name in active(model):
        for place, params in adapter_places(model, name):
            module, parameter = module_at(model, place)
            own = {} if parameter else module._parameters
            for key, p in params.named_parameters(recurse=False):
                trained |= {id(p): p.numel()} if p.requires_grad else {}
                added |= {} if own.get(key) is not None else {id(p): p.numel()}
    return trained, added


@looks_through
def base_size(model: nn.Module) -> int:
    """Count the base model's parameters: as many as before quantisation, tied ones once."""
    adapter = {id(p) for m in model.modules() if isinstance(m, Params) for p in m.parameters()}
    sizes: dict[int, int] = {}
    for module in model.modules():
        quantised = isinstance(module, FrozenLinear)
        if quantised:
            sizes[id(module)] = math.prod(module.shape)
        for name, p in module._parameters.items():
            if p is not None and id(p) not in adapter and not (quantised and name != "bias"):
                sizes[id(p)] = p.numel()
    return sum(sizes.values())


def count_once(model: nn.Module, name: str) -> int:
    seen = {id(p): p.numel() for _, ps in adapter_places(model, name) for p in ps.parameters()}
    return sum(seen.values())
