"""The adapted layer: the only class that pairs a frozen weight with methods."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from inlay.errors import AdapterError, ModelError
from inlay.methods.base import HiddenMethod, Method, Params, WeightMethod
from inlay.methods.tokens import ROWS, TOKENS, TokenRows, tokens_of
from inlay.model.adapters.by_weight import Changed, made_again
from inlay.model.adapters.derived import follow, follow_loaded
from inlay.model.adapters.instance import change_class
from inlay.model.adapters.wrapped import unwrapped
from inlay.model.pickling import MADE_BY, reduced
from inlay.storage.base import FrozenLinear, whereabouts
from inlay.storage.dense import DenseView
from inlay.storage.own import ByWeight
from inlay.storage.parameters import Parameter
from inlay.storage.reads import READ, as_value, asked_by_tool
from inlay.storage.registry import is_exact

if TYPE_CHECKING:
    from collections.abc import Callable

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
    moved: ClassVar[frozenset[str]]
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
        """Run the layer with its active adapters."""
        note_use(self)
        here = self.here()
        changed = self.changed()
        weights = [] if changed else [(m, p) for m, p in here if isinstance(m, WeightMethod)]
        if weights:
            self.keep_up(weights)
            assert self.base is not None
            h: Any = self.composed(weights[:-1]).forward_through(*weights[-1], read(args, kwargs))
            h = self.base.finished(h)
        elif changed:
            self.keep_up(self.weight_methods())
            h = self.on_weights(changed, args, kwargs)
        elif self.base is not None and self.base.replaces_forward:
            h = self.base.linear(read(args, kwargs))
        else:
            h = super().forward(*args, **kwargs)
        for method, p in here:
            if isinstance(method, HiddenMethod):
                h = method.hidden(p, read(args, kwargs), h, self.training)
        return h

    def changed(self) -> list[Changed]:
        """Return the parameters that this layer's own forward is to read adapted."""
        found: list[Changed] = []
        if isinstance(self.base, ByWeight):
            own = self.weight_methods()
            found += [Changed(self.base, own)] if own else []
        for name, view in self.part_views.items():
            at = [n for n in self.active if name in self.part_methods.get(n, {})]
            if at:
                pairs = [(self.part_methods[n][name], self.params(n).parts[name]) for n in at]
                found.append(Changed(view, pairs))
        return found

    def on_weights(
        self, changed: list[Changed], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the layer's own forward on its adapted parameters."""
        if self.training and any(rate_of(m) for each in changed for m, _ in each.pairs):
            return self.with_dropout(changed[0], read(args, kwargs))
        found = [(each, each.parameters()) for each in changed]
        held: dict[str, Tensor | None] = {n: t for _, ps in found for n, t in ps.items()}
        with made_again(found), self.holding(held):
            return super().forward(*args, **kwargs)

    def with_dropout(self, changed: Changed, x: Tensor) -> Tensor:
        """Return the output on W, and of each update, whose x is dropped out, its own.

        The output must be linear in the weight, as a convolution's is.
        """
        view = changed.view
        names = (view.parameter, view.bias_name or "bias")
        w, b = view.matrix(), view.bias
        with self.holding(dict(zip(names, (view.as_stored(w), b), strict=True))):
            h = super().forward(x)
        for method, p in changed.pairs:
            before = w, b
            w, b = method.weight(p, w), method.bias(p, b)
            moved = None if b is None or before[1] is None or b is before[1] else b - before[1]
            update = (view.as_stored(w - before[0]), moved)
            with self.holding(dict(zip(names, update, strict=True))):
                h = h + super().forward(F.dropout(x, rate_of(method)))
        return h

    @contextmanager
    def holding(self, held: dict[str, Tensor | None]) -> Generator[None]:
        """Let the layer's parameters read as these inside the `with` block."""
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

    def composed(self, weights: list[tuple[WeightMethod, Params]]) -> Composed:
        """Return the frozen weight with these methods applied, itself a frozen weight."""
        assert self.base is not None
        weight = Composed(self.base, None, self.training)
        for pair in weights:
            weight = Composed(weight if weight.pair else self.base, pair, self.training)
        return weight

    def holder_of_buffers(self) -> Params | None:
        """Return the tensors of the last active adapter that has its own copy of the buffers."""
        here = (self.params(n) for n in reversed(self.active) if n in self.methods)
        return next((p for p in here if self.moved & p._buffers.keys()), None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).moved and (holder := self.holder_of_buffers()) is not None:
            holder._buffers[name] = value
        else:
            super().__setattr__(name, value)

    def keep_up(self, weights: list[tuple[WeightMethod, Params]]) -> None:
        """Bring what these methods computed from the weight below them up to date with it."""
        for at, (method, params) in enumerate(weights):
            if method.reads_base and not vars(self).get("divided"):
                follow(method, params, self.composed(weights[:at]))

    def weight_methods(self) -> list[tuple[WeightMethod, Params]]:
        """Return the active weight methods here with their tensors, in order of activation."""
        return [(m, p) for m, p in self.here() if isinstance(m, WeightMethod)]

    def here(self) -> list[tuple[Method | None, Params]]:
        """Return what the active adapters have at this layer, tokens' rows before the method."""
        found: list[tuple[Method | None, Params]] = []
        for name in self.active:
            if name in self.methods:
                params = self.params(name)
                found += [(rows, params) for rows in self.rows_in(params)]
                found.append((self.methods[name], params))
        return found

    def rows_in(self, params: Params) -> list[TokenRows]:
        """Return what puts an adapter's rows of tokens in place of the layer's own."""
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
        """Return, by matrix, what it is, what the active weight methods define, and how it is held.

        The last are the layer's parameters by name, in float32 at least.
        """
        found: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        for each in self.changed():
            new = each.parameters(wide=True)
            view = each.view
            found.append((view.as_stored(view.matrix()), new[view.parameter], new))
        if not found and self.base is not None and self.weight_methods():
            w, bias = self.adapted_weight()
            new = {"weight": self.base.turned(w)} | ({} if bias is None else {"bias": bias})
            found.append((self.base.turned(self.base.dequantize()), new["weight"], new))
        return found

    def params(self, name: str) -> Params:
        """Return one adapter's tensors here."""
        params = self.adapters[name]
        assert isinstance(params, Params)
        return params

    def acts_on(self, name: str) -> bool:
        """Say whether a parameter reads otherwise than it is held: packed, or mapped now."""
        if name in ("weight", "bias") and not isinstance(self.base, ByWeight):
            maps = any(isinstance(self.methods.get(n), WeightMethod) for n in self.active)
            return maps or is_packed(self)
        if not self.active or not (self.part_views or isinstance(self.base, ByWeight)):
            return False
        return any(name in changed.names() for changed in self.changed())

    def acting_parameter(self, name: str) -> Tensor | None:
        """Return a parameter as it acts, for code that computes with it past `forward`."""
        self.keep_up(self.weight_methods())
        found: Tensor | None = None
        for changed in self.changed():
            if name in changed.names():
                found = changed.parameters().get(name)
                return None if found is None else self.read_as(name, found)
        base = self.base
        assert base is not None
        if name == "bias":
            found = base.bias
            for method, p in self.weight_methods():
                found = method.bias(p, found)
            return found
        w = base.matrix() if isinstance(base, DenseView) else base.dequantize()
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        with torch.autocast(w.device.type, enabled=False):
            for method, p in self.weight_methods():
                w = method.weight(p, w)
        return self.read_as(name, base.turned(w.to(base.dtype)))

    def read_as(self, name: str, value: Tensor) -> Tensor:
        """Return a parameter's value for one reader; what computes with it is noted."""
        used = partial(vars(self).__setitem__, READ, True)
        return as_value(value, f"the {name} of a {type(self).__name__}", used)

    def adapted_weight(self) -> tuple[Tensor, Tensor | None]:
        """Return the dense weight (out, in) and bias that the active weight methods define."""
        assert self.base is not None
        w, b = self.base.dequantize(), self.base.bias
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        for method, p in self.weight_methods():
            w, b = method.weight(p, w), method.bias(p, b)
        return w, b


def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return a layer's input, given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


class Composed(FrozenLinear):
    """A frozen weight with one weight method on it: again a frozen weight."""

    storage = "composed"

    def __init__(
        self, base: FrozenLinear, pair: tuple[WeightMethod, Params] | None, training: bool
    ) -> None:
        self.base, self.pair, self.training = base, pair, training

    def forward_through(self, method: WeightMethod, p: Params, x: Tensor) -> Tensor:
        """Apply one more method on top of this weight to x."""
        return method.forward(p, x, self if self.pair else self.base, self.training)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def padding(self) -> int | None:
        return self.base.padding

    @property
    def bias(self) -> Tensor | None:
        return self.pair[0].bias(self.pair[1], self.base.bias) if self.pair else self.base.bias

    def linear(self, x: Tensor) -> Tensor:
        if self.pair is None:
            return self.base.linear(x)
        return self.pair[0].forward(self.pair[1], x, self.base, self.training)

    def matmul(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.bias is None else y - self.bias

    def matmul_t(self, g: Tensor) -> Tensor:
        return g @ self.dequantize()

    def state(self) -> tuple[object, ...] | None:
        below = self.base.state()
        own = () if self.pair is None else tuple(map(whereabouts, self.pair[1].parameters()))
        return None if below is None else (*below, *own)

    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        w = self.base.dequantize()
        w = self.pair[0].weight(self.pair[1], w) if self.pair else w
        return w if rows is None else w[rows]


@cache
def adapted_class(
    original: type[nn.Module], parameters: tuple[str, ...], buffers: frozenset[str] = frozenset()
) -> type[nn.Module]:
    """Return the subclass of `original` that carries adapters; its name stays the same."""
    body: dict[str, Any] = {name: property(reader(name), refuser(name)) for name in parameters}
    body |= {name: property(own_or_moved(name)) for name in buffers}
    body |= {"original": original, "moved": buffers, "__module__": original.__module__}
    body |= {"__qualname__": original.__qualname__, "__reduce_ex__": reduced}
    body[MADE_BY] = (adapted_class, original, parameters, buffers)
    return type(original.__name__, (AdaptedLayer, original), body)


def reader(name: str) -> Callable[[AdaptedLayer], Tensor | None]:
    """Return the reader of one parameter.

    It reads as the layer's own forward is to see it while that runs, as it is held to tools, and
    as it acts to all other code.
    """

    def read(layer: AdaptedLayer) -> Tensor | None:
        held = layer.reads_as
        if held is not None and name in held:
            return held[name]
        own = layer.stored_parameter(name)
        if held is not None or not layer.acts_on(name):
            if own is not layer._parameters[name]:
                note_use(layer, read=True)
            return own
        if asked_by_tool() or (name == "bias" and is_packed(layer) and is_compiling()):
            return own  # a tool, or the storage itself
        note_use(layer, read=True)
        return layer.acting_parameter(name)

    return read


def refuser(name: str) -> Callable[[AdaptedLayer, object], None]:
    """Return what refuses to set a layer's parameter to anything but an nn.Parameter."""

    def refuse(layer: AdaptedLayer, value: object) -> None:
        raise ModelError(
            f"the {name} of a {type(layer).__name__} was set to a {type(value).__name__}, and an "
            "adapted layer's must be an nn.Parameter; torch.nn.utils' hooks (weight_norm, prune) "
            "are to be put on before adapters are attached, and FullyShardedDataParallel (FSDP1), "
            "which sets such, is not supported: use FSDP2 (fully_shard, fsdp_version: 2)"
        )

    return refuse


def own_or_moved(name: str) -> Callable[[AdaptedLayer], Tensor | None]:
    """Return the reader of one buffer: an active adapter's own copy, else the layer's."""

    def read(layer: AdaptedLayer) -> Tensor | None:
        holder = layer.holder_of_buffers()
        own = None if holder is None else holder._buffers.get(name)
        return layer._buffers[name] if own is None else own

    return read


def moved_buffers(layer: nn.Module) -> frozenset[str]:
    """Return the buffers of a layer that an adapter can have its own copy of."""
    if isinstance(layer, FrozenLinear):
        return frozenset()
    return frozenset(layer._buffers.keys() - layer._non_persistent_buffers_set)


def rate_of(method: WeightMethod) -> float:
    """Return the share of its input that a method drops out in training."""
    return float(getattr(method, "dropout", 0.0))


def is_packed(layer: nn.Module) -> bool:
    """Say whether a layer is itself a storage, whose parameters are not the weight."""
    return isinstance(layer, FrozenLinear)


def note_use(layer: AdaptedLayer, read: bool = False) -> None:
    """Tell the watch, while there is one, that the layer is called, or that its weight is read."""
    note = layer.__dict__.get("watch")
    if note is not None and not is_compiling():
        note(read)


STATE = ("methods", "active", "base", "part_methods", "part_views", "reads_as")
"""The attributes of an adapted layer beside its tables of tensors."""


def check_names_free(layer: nn.Module, name: str) -> None:
    """Raise when a layer has an attribute of its own under a name that an adapted one needs.

    Raises:
        AdapterError: it has.
    """
    if isinstance(layer, AdaptedLayer):
        return
    own = {*vars(layer), *layer._modules, *layer._parameters, *layer._buffers}
    taken = [n for n in ("adapters", *STATE) if n in own or hasattr(type(layer), n)]
    if taken:
        raise AdapterError(
            f"{name}, a {type(layer).__name__}, has an attribute {taken[0]!r} of its own, and "
            "adapters are kept under that name at the layer they adapt; rename the attribute, or "
            "leave the layer out (exclude)"
        )


def become_adapted(layer: nn.Module, base: FrozenLinear | None) -> AdaptedLayer:
    """Turn a layer into an adapted one, in place; an adapted one stays as it is."""
    if isinstance(layer, AdaptedLayer):
        return layer
    layer.adapters = nn.ModuleDict()
    state = ({}, (), base, {}, {}, None)
    layer.__dict__.update(zip(STATE, state, strict=True))
    adapted = adapted_class(type(layer), tuple(layer._parameters), moved_buffers(layer))
    change_class(layer, adapted)
    assert isinstance(layer, AdaptedLayer)
    layer.register_load_state_dict_post_hook(follow_loaded)
    return layer


def become_original(layer: AdaptedLayer) -> None:
    """Take the last traces of adapters off a layer."""
    change_class(layer, type(layer).original)
    del layer.adapters
    for name in STATE:
        del layer.__dict__[name]
    for name in ("watch", "divided", READ):
        layer.__dict__.pop(name, None)
    hooks = layer._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is follow_loaded]:
        del hooks[key]


def own_modules(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the model itself with its name, adapters' tensors never entered.

    As `named_modules` orders them; the time does not depend on how many adapters there are.
    """
    seen, module = set() if seen is None else seen, unwrapped(module)
    if module in seen or isinstance(module, Params):
        return
    seen.add(module)
    yield name, module
    for key, child in module._modules.items():
        is_table = isinstance(module, AdaptedLayer) and key == "adapters"
        if child is not None and not is_table:
            yield from own_modules(child, f"{name}.{key}" if name else key, seen)
