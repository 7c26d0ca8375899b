"""What a merge puts where, what rounding loses of it, and how it is undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from inlay.errors import MergeError
from inlay.methods.tokens import TokenRows
from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.load.quantize import others_than_first
from inlay.model.merge.fidelity import TOLERANCE
from inlay.model.merge.finite import check_merged_finite
from inlay.model.seams.accelerate import carry_over
from inlay.model.seams.transformers import INITIALISED
from inlay.storage.base import FrozenLinear
from inlay.storage.registry import frozen

HELD = frozenset({
    "methods", "active", "base", "in_features", "out_features", "compute_dtype", "stands_for",
    "computes_in_8_bits", "saved_dense", INITIALISED,
})  # fmt: skip
"""What the storages and the adapters keep in a layer, which goes with them."""


class Update:
    """The change of the weights by a merge, and how much of it rounding leaves."""

    def __init__(self) -> None:
        self.kept = self.whole = 0.0
        self.shared: dict[int, nn.Parameter] = {}

    @property
    def surviving_fraction(self) -> float:
        """The share of the update left after rounding; 1 without an update."""
        return self.kept / self.whole if self.whole else 1.0

    def account(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        delta = (exact.double() - before.double()).flatten()
        self.kept += float((rounded.double() - before.double()).flatten() @ delta)
        self.whole += float(delta @ delta)

    def changes(self, layer: AdaptedLayer) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, value and merged value of the parameters of a layer that stays."""
        changed: set[str] = set()
        if layer.keeps_class:
            for before, exact, parameters in layer.merged_parameters():
                for name, value in parameters.items():
                    own = layer._parameters[name]
                    assert own is not None
                    rounded = nn.Parameter(value.to(own.dtype, copy=True).contiguous(), False)
                    if value is exact:
                        self.account(before, exact, rounded)
                    changed.add(name)
                    yield name, own, rounded
        yield from (each for each in self.copies(layer) if each[0] not in changed)

    def copies(self, layer: AdaptedLayer) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, value and merged value of tensors with a trained copy; ties are kept."""
        for name, own in layer._parameters.items():
            copy = trained_copy(layer, name)
            if own is None or copy is None:
                continue
            if id(copy) not in self.shared:
                rounded = copy.detach().to(own.dtype, copy=True)
                check_merged_finite(name, own, copy, rounded)
                self.shared[id(copy)] = nn.Parameter(rounded, requires_grad=False)
                self.account(own, copy, rounded)
            yield name, own, self.shared[id(copy)]
        holder = layer.holder_of_buffers()
        for name in sorted(layer.copyable):
            own, moved = layer._buffers[name], holder and holder._buffers.get(name)
            if own is not None and moved is not None:
                yield name, own, moved.clone()


class Plan(Update):
    """The new layers and parameters of a merge, and those that were there before."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        self.storage = storage
        self.layers = 0
        self.dtype = torch.float64
        self.places: list[tuple[nn.Module, str, nn.Module | Tensor]] = []
        self.before: list[tuple[nn.Module, str, Any]] = []
        self.tied: dict[tuple[int, ...], nn.Parameter] = {}

    @torch.no_grad()
    def layer(self, model: nn.Module, name: str, layer: AdaptedLayer) -> None:
        self.layers += 1
        if layer.keeps_class or not layer.weight_methods():
            for parameter, own, rounded in self.changes(layer):
                self.places.append((layer, parameter, rounded))
                self.note_dtype(own.dtype)
            return
        base = layer.base
        assert base is not None
        w, bias = layer.adapted_weight()
        new = held(base, w, bias, self.storage)
        before, rounded = base.dequantize(), frozen(new).dequantize()
        check_merged_finite(f"{name}.weight" if name else "weight", before, w, rounded)
        self.account(before, w, rounded)
        self.note_dtype(base.dtype)
        if base.storage == "dense":
            self.keep_tied(layer, new)
            self.places += [(layer, key, p) for key, p in changed(layer, new, bias)]
            return
        if not name:
            raise MergeError(
                f"the model is itself the {type(layer).__name__} to merge into, which is replaced "
                "by another; put it in a module, such as nn.Sequential, before attach"
            )
        takes_over(new, layer)
        parent, _, leaf = name.rpartition(".")
        carry_over(layer, new)
        self.places.append((model.get_submodule(parent), leaf, new))

    def keep_tied(self, layer: AdaptedLayer, new: nn.Module) -> None:
        """Tie layers again that have the same trained token rows and nothing else."""
        own, merged = layer._parameters.get("weight"), new._parameters.get("weight")
        rows = [(m, p) for m, p in layer.weight_methods() if isinstance(m, TokenRows)]
        if own is None or merged is None or len(rows) < len(layer.weight_methods()):
            return
        key = (id(own), *(id(getattr(p, method.rows)) for method, p in rows))
        new._parameters["weight"] = self.tied.setdefault(key, merged)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def note_dtype(self, dtype: torch.dtype) -> None:
        """Keep the dtype with the widest tolerance."""
        self.dtype = min(self.dtype, dtype, key=lambda d: -TOLERANCE.get(d, 0))

    def apply(self) -> None:
        for owner, name, new in self.places:
            self.before.append((owner, name, home_of(owner, name)[name]))
            put(owner, name, new)

    def make_uniform(self, model: nn.Module) -> None:
        """Make dense, exactly, what is not in the first layer's format: bitsandbytes allows one."""
        for name in others_than_first(model):
            parent, _, leaf = name.rpartition(".")
            base = frozen(model.get_submodule(name))
            owner = model.get_submodule(parent)
            self.before.append((owner, leaf, owner._modules[leaf]))
            put(owner, leaf, held(base, base.dequantize(), base.bias, "dense"))

    def lost(self) -> str:
        return (
            f"{self.surviving_fraction:.1%} of the update is left in the weights after rounding "
            f"to {self.dtype_name}"
        )

    def undo(self) -> None:
        for owner, name, old in reversed(self.before):
            put(owner, name, old)


def put(owner: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    home_of(owner, name)[name] = value


def home_of(owner: nn.Module, name: str) -> dict[str, Any]:
    homes: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers, owner._modules)
    return next(home for home in homes if name in home)


def changed(
    layer: AdaptedLayer, new: nn.Module, bias: Tensor | None
) -> Iterator[tuple[str, nn.Parameter]]:
    for key, p in new._parameters.items():
        if p is not None and not (key == "bias" and layer._parameters.get("bias") is bias):
            yield key, p


def takes_over(new: nn.Module, old: nn.Module) -> None:
    """Give a new layer the hooks and the own attributes of the layer that it replaces."""
    hooks = {key for key in vars(nn.Module()) if "hooks" in key}
    vars(new).update({key: value for key, value in vars(old).items() if key in hooks})
    if isinstance(old, FrozenLinear):
        own = {*vars(new), *HELD, *vars(nn.Module())}
        vars(new).update({key: value for key, value in vars(old).items() if key not in own})


def trained_copy(layer: AdaptedLayer, name: str) -> nn.Parameter | None:
    copies = [p._parameters.get(name) for _, p in layer.active_methods()]
    return next((c for c in reversed(copies) if c is not None), None)


def held(base: FrozenLinear, w: Tensor, bias: Tensor | None, storage: str) -> nn.Module:
    if storage == "keep" or base.storage == "dense" or base.layer_kind == "embedding":
        return base.requantized(w, bias)
    out, width = base.shape
    with torch.device("meta"):
        conv1d = base.stands_for == "conv1d"
        plain = Conv1D(out, width) if conv1d else nn.Linear(width, out, bias is not None)
    return frozen(plain.to(base.dtype)).requantized(w, bias)
