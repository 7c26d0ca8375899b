"""Views of an adapter's tensors and numbers under HF PEFT's names; setting one sets the original.

A view is made when it is asked for and holds nothing of its own, so that a copied, moved or
reloaded layer has no stale ones.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.methods.base import LowRank, replaced
from inlay.methods.params import Params
from inlay.model.adapters.layer import AdaptedLayer


@dataclass(frozen=True)
class PeftName:
    """HF PEFT's name of one tensor: its table at the layer, and its name below the adapter's."""

    tensor: str
    table: str
    below: str
    part: str = ""
    """The single parameter of the layer that it is for; empty where it is for the layer."""


class Linked(dict[str, Any]):
    """The parameters of a view: setting one sets it where it lives."""

    def __init__(self, homes: Mapping[str, tuple[Params, str]]) -> None:
        super().__init__({key: home._parameters[name] for key, (home, name) in homes.items()})
        self.homes = homes

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        home, name = self.homes[key]
        home._parameters[name] = value


class Leaf(nn.Module):
    """One tensor of an adapter as HF PEFT holds it: the `weight` of a module of its own."""

    weight: nn.Parameter

    def __init__(self, homes: Mapping[str, tuple[Params, str]]) -> None:
        nn.Module.__init__(self)
        vars(self)["_parameters"] = Linked(homes)

    @property
    def bias(self) -> nn.Parameter | None:
        return vars(self)["_parameters"].get("bias")

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Leaves(nn.ModuleDict):
    """One kind of tensor by adapter, as HF PEFT's `ModuleDict` of linear layers is."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        here = self._modules.get(key)
        if here is None or module is here:
            super().__setitem__(key, module)
            return
        for name, value in module._parameters.items():
            if value is not None:
                here._parameters[name] = value


class Matrix(Leaf, nn.Linear):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """A matrix of an adapter as HF PEFT holds it: a linear layer."""

    def __init__(self, homes: Mapping[str, tuple[Params, str]]) -> None:
        Leaf.__init__(self, homes)
        self.out_features, self.in_features = self.weight.shape

    def _get_name(self) -> str:
        return "Linear"


class Tensors(nn.ParameterDict):
    """One kind of tensor by adapter, as HF PEFT's `ParameterDict` is."""

    def __init__(self, homes: Mapping[str, tuple[Params, str]]) -> None:
        super().__init__()
        vars(self)["_parameters"] = Linked(homes)
        vars(self)["_keys"] = dict.fromkeys(homes)

    def extra_repr(self) -> str:
        return ", ".join(f"({name}): {list(value.shape)}" for name, value in self.items())

    def __getitem__(self, key: str) -> Any:
        return vars(self)["_parameters"][key]

    def __setitem__(self, key: str, value: Any) -> None:
        vars(self)["_parameters"][key] = value


def tables(
    layer: AdaptedLayer, names: Iterable[tuple[str, tuple[PeftName, ...]]]
) -> dict[str, nn.Module]:
    homes: dict[str, dict[str, dict[str, tuple[Params, str]]]] = {}
    for adapter, named in names:
        home = layer.adapters._modules.get(adapter)
        for name in named if isinstance(home, Params) else ():
            assert isinstance(home, Params)
            below = homes.setdefault(name.table, {}).setdefault(adapter, {})
            below[name.below] = (home.parts[name.part] if name.part else home, name.tensor)
    found: dict[str, nn.Module] = {}
    for table, there in homes.items():
        nested(found, table, table_of(table, there, layer))
    for module in (m for view in found.values() for m in view.modules()):
        module.training = layer.training
    return found


def named_below(
    module: nn.Module,
    children: Iterable[tuple[str, nn.Module]],
    memo: set[nn.Module] | None,
    prefix: str,
    remove_duplicate: bool,
) -> Iterator[tuple[str, nn.Module]]:
    memo = set() if memo is None else memo
    if module in memo:
        return
    if remove_duplicate:
        memo.add(module)
    yield prefix, module
    for name, child in children:
        below = f"{prefix}.{name}" if prefix else name
        yield from child.named_modules(memo, below, remove_duplicate)


def nested(found: dict[str, nn.Module], table: str, view: nn.Module) -> None:
    first, *rest = table.split(".")
    if not rest:
        found[first] = view
        return
    below = found.setdefault(first, nn.ModuleDict())
    inner = dict(below.named_children())
    nested(inner, ".".join(rest), view)
    found[first] = nn.ModuleDict(inner)


def table_of(
    table: str, found: Mapping[str, Mapping[str, tuple[Params, str]]], layer: AdaptedLayer
) -> nn.Module:
    if any("" in below for below in found.values()):
        return Tensors({adapter: below[""] for adapter, below in found.items()})
    if table == "modules_to_save":
        return nn.ModuleDict({adapter: with_tensors(layer, adapter) for adapter in found})
    return Leaves({adapter: leaf_of(table, below) for adapter, below in found.items()})


def leaf_of(table: str, below: Mapping[str, tuple[Params, str]]) -> nn.Module:
    home, name = below["weight"]
    flat = table.rpartition(".")[2] in ("lora_A", "lora_B") and home._parameters[name].ndim == 2  # pyright: ignore[reportOptionalMemberAccess]
    return Matrix(below) if flat else Leaf(below)


def with_tensors(layer: AdaptedLayer, adapter: str | None) -> nn.Module:
    """Return a layer without adapters, on one adapter's copies of its tensors or on its own."""
    original = type(layer).original
    found = original.__new__(original)
    vars(found).update(vars(layer))
    found._modules = {k: m for k, m in layer._modules.items() if k != "adapters"}
    if adapter is not None and adapter in layer.adapters:
        held = layer.params(adapter)
        own = {n: (held, n) for n in layer._parameters if n in held._parameters}
        copies = Linked(own)
        dict.update(copies, {n: p for n, p in layer._parameters.items() if n not in own})
        vars(found)["_parameters"] = copies
        found._buffers = {**layer._buffers, **held._buffers}
    return found


def low_rank_of(layer: AdaptedLayer) -> dict[str, LowRank]:
    """Return each adapter's low-rank method; of several on single parameters, the first."""
    found: dict[str, LowRank] = {}
    for name in layer.methods:
        here = [table[key] for table, key in homes_of_methods(layer, name)]
        first = next((method for method in here if isinstance(method, LowRank)), None)
        if first is not None:
            found[name] = first
    return found


def has(layer: AdaptedLayer | None, adapter: object) -> bool:
    return isinstance(layer, AdaptedLayer) and adapter in layer.methods


class Numbers(Mapping[str, Any]):
    """One number of each adapter at a layer, computed whenever it is read."""

    def __init__(
        self, layer: AdaptedLayer, read: Callable[[AdaptedLayer], Mapping[str, Any]]
    ) -> None:
        self.layer: Any = layer  # another class once its last adapter is gone
        self.read = read

    def now(self) -> dict[str, Any]:
        found = self.read(self.layer) if isinstance(self.layer, AdaptedLayer) else {}
        return {name: value for name, value in found.items() if has(self.layer, name)}

    def __getitem__(self, name: str) -> Any:
        return self.now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.now())

    def __len__(self) -> int:
        return len(self.now())

    def __repr__(self) -> str:
        return repr(self.now())


class Scaling(Numbers):
    """The factor of each adapter's product B A; setting one changes what the layer computes."""

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__(layer, lambda here: {n: m.scale for n, m in low_rank_of(here).items()})

    def __setitem__(self, name: str, scale: float) -> None:
        factor = scale / self[name] if self[name] else None
        for table, key in list(homes_of_methods(self.layer, name)):
            method = table[key]
            if isinstance(method, LowRank):
                table[key] = scaled(method, scale if factor is None else method.scale * factor)

    def copy(self) -> dict[str, float]:
        return dict(self)


def scaled(method: LowRank, scale: float) -> LowRank:
    """Return the method with this scale, which may be zero or less, as no new method's may be."""
    if scale == method.scale:
        return method
    unit = replaced(method, alpha=1.0)
    assert isinstance(unit, LowRank)
    changed = copy.copy(method)
    object.__setattr__(changed, "alpha", scale / unit.scale)
    return changed


class Dropouts(nn.ModuleDict):
    def __init__(self, layer: AdaptedLayer) -> None:
        vars(self)["where"] = weakref.ref(layer)
        rates = {name: method.dropout for name, method in low_rank_of(layer).items()}
        super().__init__({name: Dropout(layer, name) for name, p in rates.items() if p > 0})
        self.train(layer.training)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name)) and has(vars(self)["where"](), name)


class Dropout(nn.Dropout):
    """An adapter's dropout; setting `p` changes what the layer computes."""

    def __init__(self, layer: AdaptedLayer, adapter: str) -> None:
        self.where = weakref.ref(layer), adapter
        super().__init__(low_rank_of(layer)[adapter].dropout)
        self.training = layer.training

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "p" and "where" in vars(self):
            layer, adapter = vars(self)["where"][0](), vars(self)["where"][1]
            for table, key in homes_of_methods(layer, adapter) if layer is not None else ():
                method = table[key]
                if isinstance(method, LowRank) and method.dropout != value:
                    table[key] = replaced(method, dropout=float(value))


def homes_of_methods(layer: AdaptedLayer, adapter: str) -> Iterator[tuple[dict[str, Any], str]]:
    if adapter in layer.methods:
        yield layer.methods, adapter
    for part in layer.part_methods.get(adapter, {}):
        yield layer.part_methods[adapter], part
