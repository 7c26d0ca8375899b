"""The adapters of a model: which there are, which of them act, and where their tensors lie."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from inlay.errors import AdapterError, did_you_mean
from inlay.methods.base import Kind, Method, Params, PromptMethod
from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.adapters.places import module_at
from inlay.model.adapters.prompts.hooks import PromptHook
from inlay.model.adapters.targets import Found
from inlay.model.adapters.watch import Watch
from inlay.model.adapters.wrappers import looks_through
from inlay.storage.registry import matrix_kind


@dataclass(frozen=True)
class Attached:
    """One adapter on a model: what was asked for and where it went."""

    name: str
    method: Method
    targets: str | tuple[str, ...]
    exclude: tuple[str, ...]
    layers: str | tuple[int, ...] | None
    modules_to_save: tuple[str, ...]
    found: Found
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Module name -> the ids of the tokens whose rows of it train."""


@dataclass
class Registry:
    """The adapters of one model, the active ones, and what `detach` gives back to the model."""

    adapters: dict[str, Attached] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    required_grad: dict[str, bool] = field(default_factory=dict)
    prompt: PromptHook | None = None
    notes: tuple[str, ...] = ()
    """Sentences about fast paths that do not run on this model."""
    watch: Watch | None = None
    classes: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    """Modules without tensors of adapters whose class was changed, and the class before."""
    overridden: list[Override] = field(default_factory=list)
    refusal: RemovableHandle | None = None
    """The hook that keeps the model from running while an active adapter has no values."""


@dataclass
class Override:
    """An attribute of a module's instance that stands in for the class's while adapters are on."""

    module: nn.Module
    name: str
    value: Any
    before: tuple[Any, ...]
    """The instance's own attribute of this name, where it had one."""


def override(registry: Registry, module: nn.Module, name: str, value: Any) -> None:
    if any(each.module is module and each.name == name for each in registry.overridden):
        return
    before = (vars(module)[name],) if name in vars(module) else ()
    registry.overridden.append(Override(module, name, value, before))
    vars(module)[name] = value


def restore_overridden(registry: Registry) -> None:
    """Give every overridden attribute back, unless other code has set it since."""
    for each in registry.overridden:
        if vars(each.module).get(each.name) is each.value:
            del vars(each.module)[each.name]
            for value in each.before:
                vars(each.module)[each.name] = value


@looks_through
def registry_of(model: nn.Module) -> Registry | None:
    return vars(model).get("inlay")


@looks_through
def required_registry(model: nn.Module) -> Registry:
    registry = registry_of(model)
    if registry is None:
        raise AdapterError(f"the {type(model).__name__} has no adapter; call inlay.attach first")
    return registry


@looks_through
def adapters(model: nn.Module) -> dict[str, Attached]:
    registry = registry_of(model)
    return dict(registry.adapters) if registry else {}


@looks_through
def active(model: nn.Module) -> tuple[str, ...]:
    registry = registry_of(model)
    return registry.active if registry else ()


@looks_through
def notes(model: nn.Module) -> tuple[str, ...]:
    registry = registry_of(model)
    return registry.notes if registry else ()


def check_new_name(name: str, registry: Registry) -> None:
    if name in registry.adapters:
        raise AdapterError(f"the model already has an adapter named {name!r}; choose another name")
    if not name or "." in name or name.strip() != name:
        raise AdapterError(f"an adapter's name must be non-empty, without dots: {name!r} is not")
    if name in dir(nn.ModuleDict):
        raise AdapterError(f"an adapter cannot be named {name!r}, a word torch uses itself")


def check_known(name: str, registry: Registry) -> None:
    if name not in registry.adapters:
        have = ", ".join(registry.adapters)
        hint = did_you_mean(name, registry.adapters)
        raise AdapterError(f"the model has no adapter named {name!r}; it has {have}.{hint}")


@looks_through
def adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    return (m for _, m in own_modules(model) if isinstance(m, AdaptedLayer))


def activate(model: nn.Module, registry: Registry, names: tuple[str, ...]) -> None:
    for layer in adapted_layers(model):
        layer.active = tuple(n for n in names if n in layer.adapters)
    if registry.prompt:
        prompts = [n for n in names if n in registry.prompt.methods]
        registry.prompt.active = prompts[0] if prompts else None


@contextmanager
def layers_inactive(model: nn.Module) -> Generator[None]:
    """Have no adapter act at any layer inside the `with` block; prompts go on."""
    before = {layer: layer.active for layer in adapted_layers(model)}
    for layer in before:
        layer.active = ()
    try:
        yield
    finally:
        for layer, names in before.items():
            layer.active = names


@looks_through
def adapter_places(model: nn.Module, name: str) -> Iterator[tuple[str, Params]]:
    """Yield every place where one adapter has tensors, with these; "" is the whole model.

    A place is the name of a module, or of one parameter of a module.
    """
    for module_name, module in own_modules(model):
        if isinstance(module, AdaptedLayer) and name in module.adapters:
            params = module.params(name)
            if params._parameters or params._buffers or not params.parts:
                yield module_name, params
            for parameter, part in params.parts.items():
                yield f"{module_name}.{parameter}" if module_name else parameter, part
    registry = required_registry(model)
    if registry.prompt and name in registry.prompt.methods:
        yield "", registry.prompt.params(name)


@looks_through
def adapter_tensors(
    model: nn.Module, name: str
) -> Iterator[tuple[str, Params, Method | None, Kind | None]]:
    registry = required_registry(model)
    check_known(name, registry)
    whole = registry.adapters[name].method
    for place, params in adapter_places(model, name):
        module, parameter = module_at(model, place)
        if parameter is not None:
            assert isinstance(module, AdaptedLayer)
            yield place, params, module.part_methods[name][parameter], "linear"
            continue
        method = module.methods[name] if isinstance(module, AdaptedLayer) else None
        if method is None and not place and isinstance(whole, PromptMethod):
            method = whole
        yield place, params, method, matrix_kind(module)
