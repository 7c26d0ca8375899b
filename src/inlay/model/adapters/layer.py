"""The adapted layer: the only class that pairs a frozen weight with methods."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from inlay.methods.base import HiddenMethod, Method, Params, WeightMethod
from inlay.methods.tokens import ROWS, TOKENS, TokenRows, tokens_of
from inlay.model.adapters.adapted_weight import AdaptedParameter, Composed, recomputed_in_backward
from inlay.model.adapters.derived import follow
from inlay.model.adapters.wrappers import unwrapped
from inlay.storage.base import FrozenLinear
from inlay.storage.dense import DenseView
from inlay.storage.own import ByWeight
from inlay.storage.parameters import Parameter
from inlay.storage.reads import READ, as_value
from inlay.storage.registry import is_exact

if TYPE_CHECKING:
    Base = nn.Module
else:
    Base = object


class AdaptedLayer(Base):
    """A layer of the model, in place, with adapters beside its frozen weight.

    The module object, its name, its parameters and its `isinstance` stay what they were: only
    its class becomes a subclass of itself, as `torch.nn.utils.parametrize` does. The output is

        h = W'(x),  W' = the active weight methods applied to W in order of activation
        h' = the active hidden methods applied to h

    and a parameter that an active adapter has its own trained copy of reads as that copy. A layer
    whose forward is its own, or that holds several matrices, runs it on the parameters W'.
    """

    original: ClassVar[type[nn.Module]]
    copyable: ClassVar[frozenset[str]]
    """The buffers that an adapter may have its own copy of, such as running statistics."""
    adapters: nn.ModuleDict
    methods: dict[str, Method | None]
    active: tuple[str, ...]
    base: FrozenLinear | None
    part_methods: dict[str, dict[str, WeightMethod]]
    """Adapter -> parameter -> the method on that parameter alone."""
    part_views: dict[str, Parameter]
    """Parameter -> its matrix, for those in `part_methods`."""
    reads_as: dict[str, Tensor | None] | None
    """What the parameters read as while the layer's own forward runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        note_use(self)
        here = self.active_methods()
        changed = self.adapted_parameters()
        weights = [] if changed else [(m, p) for m, p in here if isinstance(m, WeightMethod)]
        if weights:
            self.update_derived(weights)
            assert self.base is not None
            below, (method, p) = self.composed(weights[:-1]), weights[-1]
            h: Any = method.forward(p, input_of(args, kwargs), below, self.training)
            h = self.base.finished(h)
        elif changed:
            self.update_derived(self.weight_methods())
            h = self.on_weights(changed, args, kwargs)
        elif self.base is not None and self.base.replaces_forward:
            h = self.base.linear(input_of(args, kwargs))
        else:
            h = super().forward(*args, **kwargs)
        for method, p in here:
            if isinstance(method, HiddenMethod):
                h = method.hidden(p, input_of(args, kwargs), h, self.training)
        return h

    def adapted_parameters(self) -> list[AdaptedParameter]:
        found: list[AdaptedParameter] = []
        if isinstance(self.base, ByWeight):
            own = self.weight_methods()
            found += [AdaptedParameter(self.base, own)] if own else []
        for name, view in self.part_views.items():
            at = [n for n in self.active if name in self.part_methods.get(n, {})]
            if at:
                pairs = [(self.part_methods[n][name], self.params(n).parts[name]) for n in at]
                found.append(AdaptedParameter(view, pairs))
        return found

    def on_weights(
        self, changed: list[AdaptedParameter], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.training and any(dropout_of(m) for each in changed for m, _ in each.pairs):
            return self.with_dropout(changed[0], input_of(args, kwargs))
        found = [(each, each.parameters()) for each in changed]
        held: dict[str, Tensor | None] = {n: t for _, ps in found for n, t in ps.items()}
        with recomputed_in_backward(found), self.reading_as(held):
            return super().forward(*args, **kwargs)

    def with_dropout(self, changed: AdaptedParameter, x: Tensor) -> Tensor:
        """Return the output with dropout on each update's input; it is linear in the weight."""
        view = changed.view
        names = (view.parameter, view.bias_name or "bias")
        w, b = view.matrix(), view.bias
        with self.reading_as(dict(zip(names, (view.as_stored(w), b), strict=True))):
            h = super().forward(x)
        for method, p in changed.pairs:
            before = w, b
            w, b = method.weight(p, w), method.bias(p, b)
            bias_update = (
                None if b is None or before[1] is None or b is before[1] else b - before[1]
            )
            update = (view.as_stored(w - before[0]), bias_update)
            with self.reading_as(dict(zip(names, update, strict=True))):
                h = h + super().forward(F.dropout(x, dropout_of(method)))
        return h

    @contextmanager
    def reading_as(self, held: dict[str, Tensor | None]) -> Generator[None]:
        before, self.__dict__["reads_as"] = self.reads_as, held
        try:
            yield
        finally:
            self.__dict__["reads_as"] = before

    def stored_parameter(self, name: str) -> Tensor | None:
        """Return a parameter without weight methods: an active adapter's copy, else the layer's."""
        if name not in self._parameters:  # computed from others, or none
            return self.__dict__.get(name, getattr(super(), name, None))
        own, adapters = self._parameters[name], self.adapters._modules
        for adapter in reversed(self.active):
            params = adapters.get(adapter)
            trained = None if params is None else params._parameters.get(name)
            if trained is not None:
                return trained if own is None else trained.to(own.dtype)
        return own

    def composed(self, weights: list[tuple[WeightMethod, Params]]) -> FrozenLinear:
        assert self.base is not None
        weight = self.base
        for method, params in weights:
            weight = Composed(weight, method, params, self.training)
        return weight

    def holder_of_buffers(self) -> Params | None:
        here = (self.params(n) for n in reversed(self.active) if n in self.methods)
        return next((p for p in here if self.copyable & p._buffers.keys()), None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).copyable and (holder := self.holder_of_buffers()) is not None:
            holder._buffers[name] = value
        else:
            super().__setattr__(name, value)

    def update_derived(self, weights: list[tuple[WeightMethod, Params]]) -> None:
        for at, (method, params) in enumerate(weights):
            if method.reads_base and not vars(self).get("divided"):
                follow(method, params, self.composed(weights[:at]))

    def weight_methods(self) -> list[tuple[WeightMethod, Params]]:
        return [(m, p) for m, p in self.active_methods() if isinstance(m, WeightMethod)]

    def active_methods(self) -> list[tuple[Method | None, Params]]:
        found: list[tuple[Method | None, Params]] = []
        for name in self.active:
            if name in self.methods:
                params = self.params(name)
                found += [(rows, params) for rows in self.rows_in(params)]
                found.append((self.methods[name], params))
        return found

    def rows_in(self, params: Params) -> list[TokenRows]:
        if self.base is None or TOKENS not in vars(params):
            return []
        kinds = (self.base.layer_kind, self.base.stands_for)
        kind = "embedding" if "embedding" in kinds else "linear"
        return [TokenRows(rows=r, kind=kind) for r in ROWS if tokens_of(params, r)]

    @property
    def keeps_class(self) -> bool:
        """Whether a merge changes parameters of this very layer, as no plain one is its like."""
        if self.part_views or isinstance(self.base, ByWeight):
            return True
        return self.base is not None and self.base.storage == "dense" and not is_exact(self)

    def merged_parameters(self) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Return, for each adapted matrix, its value before and after a merge, and what is stored.

        The last are the layer's parameters by name, in float32 at least.
        """
        found: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        for each in self.adapted_parameters():
            new = each.parameters(wide=True)
            view = each.view
            found.append((view.as_stored(view.matrix()), new[view.parameter], new))
        if not found and self.base is not None and self.weight_methods():
            w, bias = self.adapted_weight()
            new = {"weight": self.base.turned(w)} | ({} if bias is None else {"bias": bias})
            found.append((self.base.turned(self.base.dequantize()), new["weight"], new))
        return found

    def params(self, name: str) -> Params:
        params = self.adapters[name]
        assert isinstance(params, Params)
        return params

    def is_computed(self, name: str) -> bool:
        """Return whether a parameter is packed, or adapted now: it acts as another than is held."""
        if name in ("weight", "bias") and not isinstance(self.base, ByWeight):
            adapted = any(isinstance(self.methods.get(n), WeightMethod) for n in self.active)
            return adapted or isinstance(self, FrozenLinear)
        if not self.active or not (self.part_views or isinstance(self.base, ByWeight)):
            return False
        return any(name in changed.names() for changed in self.adapted_parameters())

    def computed_parameter(self, name: str) -> Tensor | None:
        """Return a parameter as it acts, for code that computes with it past `forward`."""
        self.update_derived(self.weight_methods())
        found: Tensor | None = None
        for changed in self.adapted_parameters():
            if name in changed.names():
                found = changed.parameters().get(name)
                return None if found is None else self.as_read(name, found)
        base = self.base
        assert base is not None
        if name == "bias":
            found = base.bias
            for method, p in self.weight_methods():
                found = method.bias(p, found)
            return found
        return self.as_read(name, base.turned(self.adapted_weight()[0].to(base.dtype)))

    def as_read(self, name: str, value: Tensor) -> Tensor:
        """Return a parameter's value for one reader; what computes with it is noted."""
        used = partial(vars(self).__setitem__, READ, True)
        return as_value(value, f"the {name} of a {type(self).__name__}", used)

    def adapted_weight(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight (out, in), in fp32 at least, and bias with every active method."""
        base = self.base
        assert base is not None
        w, b = base.matrix() if isinstance(base, DenseView) else base.dequantize(), base.bias
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        with torch.autocast(w.device.type, enabled=False):
            for method, p in self.weight_methods():
                w, b = method.weight(p, w), method.bias(p, b)
        return w, b


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def copyable_buffers(layer: nn.Module) -> frozenset[str]:
    if isinstance(layer, FrozenLinear):
        return frozenset()
    return frozenset(layer._buffers.keys() - layer._non_persistent_buffers_set)


def dropout_of(method: WeightMethod) -> float:
    return float(getattr(method, "dropout", 0.0))


def note_use(layer: AdaptedLayer, read: bool = False) -> None:
    note = layer.__dict__.get("watch")
    if note is not None and not is_compiling():
        note(read)


def own_modules(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model's own modules in the order of `named_modules`, without adapters' tensors."""
    seen, module = set() if seen is None else seen, unwrapped(module)
    if module in seen or isinstance(module, Params):
        return
    seen.add(module)
    yield name, module
    for key, child in module._modules.items():
        is_table = isinstance(module, AdaptedLayer) and key == "adapters"
        if child is not None and not is_table:
            yield from own_modules(child, f"{name}.{key}" if name else key, seen)
