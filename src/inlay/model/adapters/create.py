"""Create the tensors of a method at every place it goes to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inlay.errors import AdapterError, TargetError
from inlay.methods.base import (
    HiddenMethod,
    Kind,
    Method,
    Params,
    PromptMethod,
    SelectMethod,
    WeightMethod,
    replaced,
)
from inlay.methods.tokens import ROWS, give_tokens, tokens_of
from inlay.model.adapters.change_class import is_shadowed
from inlay.model.adapters.copies import selected_copies
from inlay.model.adapters.entries import entries
from inlay.model.adapters.layer import dropout_of
from inlay.model.adapters.places import Matrix, matrices_at
from inlay.model.adapters.targets import Found, adaptable_kinds, find_targets
from inlay.model.adapters.wrappers import unwrapped
from inlay.model.seams.accelerate import brought_in
from inlay.storage.base import FrozenLinear
from inlay.storage.convolution import is_convolution
from inlay.storage.parameters import Parameter
from inlay.storage.registry import frozen, matrix_kind


@dataclass
class Place:
    """What one adapter puts at one module."""

    method: Method | None = None
    params: Params = field(default_factory=lambda: Params({}))
    parts: dict[str, WeightMethod] = field(default_factory=dict)
    """Parameter -> the method on it alone, whose tensors are a part of `params`."""

    def add(self, copies: Params) -> None:
        for name, copy in copies.named_parameters():
            self.params.register_parameter(name, copy)
        for name, copy in copies.named_buffers():
            self.params.register_buffer(name, copy)
        for rows in ROWS:
            if tokens_of(copies, rows):
                give_tokens(self.params, rows, tokens_of(copies, rows))


def places_for(
    model: nn.Module,
    method: Method,
    targets: str | Sequence[str] | None,
    exclude: str | Sequence[str],
    layers: str | tuple[int, ...] | None,
    saved: Sequence[str],
    seed: int,
) -> tuple[dict[str, Place], Found]:
    if isinstance(method, PromptMethod):
        if targets or exclude or layers is not None:
            raise AdapterError(f"{method.name} acts on the whole model: leave targets out")
        return {}, Found()
    if isinstance(method, SelectMethod):
        copies = selected_copies(model, method, targets, exclude, layers)
        return {n: Place(None, p) for n, p in copies.items()}, Found(tuple(copies))
    assert isinstance(method, WeightMethod | HiddenMethod)
    found = find_targets(
        model,
        method.own_targets if targets is None else targets,
        exclude=(*entries(exclude), *saved),
        layers=layers,
        kinds=adaptable_kinds(method),
    )
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, Place] = {}
    for name in found.names:
        if isinstance(method, HiddenMethod):
            places[name] = hidden_place(model, name, method, generator)
        else:
            add_weight_places(places, model, name, method, generator)
    for extra in method.also_selects:
        for module_name, copies in extra_copies(model, extra, found).items():
            places.setdefault(module_name, Place()).add(copies)
    return places, found


def extra_copies(model: nn.Module, extra: SelectMethod, found: Found) -> dict[str, Params]:
    try:
        return selected_copies(model, extra, found.names if extra.only_adapted else None)
    except TargetError:
        where = (
            "its adapted layers have" if extra.only_adapted else f"this {type(model).__name__} has"
        )
        warnings.warn(
            f"bias training was asked for and trains nothing: {where} no bias", stacklevel=2
        )
        return {}


def hidden_place(model: nn.Module, name: str, method: HiddenMethod, seed: torch.Generator) -> Place:
    here = method.for_layer(name)
    assert isinstance(here, HiddenMethod)
    block = unwrapped(model.get_submodule(name))
    check_not_shadowed(block, name, here)
    return Place(here, here.init(*shape_and_device(block), seed))


def add_weight_places(
    places: dict[str, Place],
    model: nn.Module,
    name: str,
    method: WeightMethod,
    seed: torch.Generator,
) -> None:
    for at in matrices_at(model, name):
        here = method.for_layer(at.place)
        assert isinstance(here, WeightMethod)
        here = without_dropout(here, at)
        module = unwrapped(model.get_submodule(at.name))
        check_not_shadowed(module, at.place, here, at.view)
        with brought_in(module):
            params = initial(here, at, matrix_kind(module) or "linear", seed)
        if at.parameter is None:
            places[at.name] = Place(here, params)
            continue
        place = places.setdefault(at.name, Place())
        place.params.add_module(at.parameter, params)
        place.parts[at.parameter] = here


def initial(method: WeightMethod, at: Matrix, layer_kind: Kind, seed: torch.Generator) -> Params:
    if not isinstance(at.view, Parameter) or at.view.stack is None:
        return method.init(at.view, layer_kind, seed)
    each = [method.init(member, layer_kind, seed) for member in at.view.each()]

    def stacked(names: Sequence[str]) -> dict[str, Tensor]:
        return {n: torch.stack([getattr(p, n).detach() for p in each]) for n in names}

    derived = each[0]._non_persistent_buffers_set
    fixed = [n for n in each[0]._buffers if n not in derived]
    return Params(stacked(list(each[0]._parameters)), stacked(fixed), stacked(list(derived)))


def without_dropout(method: WeightMethod, at: Matrix) -> WeightMethod:
    """Return the method as it acts here: no dropout on an input that the layer reads by itself."""
    if not at.view.by_weight or at.view.linear_in_weight or not dropout_of(method):
        return method
    changed = replaced(method, dropout=0.0)
    assert isinstance(changed, WeightMethod)
    return changed


def check_not_shadowed(
    module: nn.Module, name: str, method: Method, view: FrozenLinear | None = None
) -> None:
    """Raise when the instance's own forward does not call its class's, where an adapter acts.

    A forward of its own that reads a dense weight reads the adapted one, which is well.
    """
    if is_shadowed(module) and (view is None or view.storage != "dense"):
        own = vars(module)["forward"]
        raise AdapterError(
            f"{name or 'the model'} has a forward of its own instance, "
            f"{getattr(own, '__qualname__', type(own).__name__)}, which does not call the forward "
            f"of its class {type(module).__name__}, so that an adapter ({method.name}) would have "
            "no effect there; leave it out with exclude, or attach before that forward is set"
        )


def shape_and_device(module: nn.Module) -> tuple[tuple[int, int], Tensor]:
    layers = [
        m
        for m in module.modules()
        if matrix_kind(m) in ("linear", "conv1d") and not is_convolution(m)
    ]
    if not layers:
        raise AdapterError(f"the block {type(module).__name__} has no linear layer to size by")
    first, last = frozen(layers[0]), frozen(layers[-1])
    with brought_in(layers[0]):
        like = torch.empty(0, dtype=first.dtype, device=first.device)
    return (last.shape[0], first.shape[1]), like
