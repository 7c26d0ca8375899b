"""The class of an adapted layer, made from the layer's own, and the layer's change to it and back.

A parameter of an adapted layer is a property of the class: it reads as the layer's own forward is
to see it while that runs, as it is held to tools, and as it acts to all other code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from inlay.errors import AdapterError, ModelError
from inlay.model.adapters.change_class import change_class
from inlay.model.adapters.derived import follow_loaded
from inlay.model.adapters.layer import AdaptedLayer, copyable_buffers, note_use
from inlay.model.pickling import MADE_BY, reduced
from inlay.storage.base import FrozenLinear
from inlay.storage.reads import READ, asked_by_tool

STATE = ("methods", "active", "base", "part_methods", "part_views", "reads_as")
"""The attributes of an adapted layer beside its table of tensors, `adapters`."""


@cache
def adapted_class(
    original: type[nn.Module], parameters: tuple[str, ...], buffers: frozenset[str] = frozenset()
) -> type[nn.Module]:
    body: dict[str, Any] = {name: property(reader(name), refuser(name)) for name in parameters}
    body |= {name: property(buffer_reader(name)) for name in buffers}
    body |= {"original": original, "copyable": buffers, "__module__": original.__module__}
    body |= {"__qualname__": original.__qualname__, "__reduce_ex__": reduced}
    body[MADE_BY] = (adapted_class, original, parameters, buffers)
    return type(original.__name__, (AdaptedLayer, original), body)


def reader(name: str) -> Callable[[AdaptedLayer], Tensor | None]:
    def read(layer: AdaptedLayer) -> Tensor | None:
        held = layer.reads_as
        if held is not None and name in held:
            return held[name]
        own = layer.stored_parameter(name)
        if held is not None or not layer.is_computed(name):
            if own is not layer._parameters[name]:
                note_use(layer, read=True)
            return own
        by_storage = name == "bias" and isinstance(layer, FrozenLinear) and is_compiling()
        if asked_by_tool() or by_storage:
            return own
        note_use(layer, read=True)
        return layer.computed_parameter(name)

    return read


def refuser(name: str) -> Callable[[AdaptedLayer, object], None]:
    """Return the setter of one parameter's property: torch sets an nn.Parameter past it."""

    def refuse(layer: AdaptedLayer, value: object) -> None:
        raise ModelError(
            f"the {name} of a {type(layer).__name__} was set to a {type(value).__name__}, and an "
            "adapted layer's must be an nn.Parameter; torch.nn.utils' hooks (weight_norm, prune) "
            "are to be put on before adapters are attached, and FullyShardedDataParallel (FSDP1), "
            "which sets such, is not supported: use FSDP2 (fully_shard, fsdp_version: 2)"
        )

    return refuse


def buffer_reader(name: str) -> Callable[[AdaptedLayer], Tensor | None]:
    def read(layer: AdaptedLayer) -> Tensor | None:
        holder = layer.holder_of_buffers()
        own = None if holder is None else holder._buffers.get(name)
        return layer._buffers[name] if own is None else own

    return read


def check_names_free(layer: nn.Module, name: str) -> None:
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
    if isinstance(layer, AdaptedLayer):
        return layer
    layer.adapters = nn.ModuleDict()
    state = ({}, (), base, {}, {}, None)
    layer.__dict__.update(zip(STATE, state, strict=True))
    adapted = adapted_class(type(layer), tuple(layer._parameters), copyable_buffers(layer))
    change_class(layer, adapted)
    assert isinstance(layer, AdaptedLayer)
    layer.register_load_state_dict_post_hook(follow_loaded)
    return layer


def become_original(layer: AdaptedLayer) -> None:
    change_class(layer, type(layer).original)
    del layer.adapters
    for name in STATE:
        del layer.__dict__[name]
    for name in ("watch", "divided", READ):
        layer.__dict__.pop(name, None)
    hooks = layer._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is follow_loaded]:
        del hooks[key]
