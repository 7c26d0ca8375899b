"""Attach, use, disable, detach: the verbs that put adapters on a model and take them off."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from inlay.errors import AdapterError, did_you_mean
from inlay.methods.base import Kind, Method, Params, PromptMethod, WeightMethod
from inlay.model.adapters.acts import Watch
from inlay.model.adapters.derived import note
from inlay.model.adapters.guards import guard, say_shared, unguard
from inlay.model.adapters.instance import change_class
from inlay.model.adapters.layer import (
    AdaptedLayer,
    become_adapted,
    become_original,
    check_names_free,
    own_modules,
)
from inlay.model.adapters.model_methods import answer_for, stop_answering
from inlay.model.adapters.places import module_at
from inlay.model.adapters.placing import Place, places_for
from inlay.model.adapters.prompt import PromptHook, prompt_hook
from inlay.model.adapters.selected import trained_modules
from inlay.model.adapters.steady import hold_statistics, release_statistics
from inlay.model.adapters.targets import Found
from inlay.model.adapters.tokens import Tokens, check_apart, token_rows
from inlay.model.adapters.wrapped import gains, looks_through, unwrapped
from inlay.model.fast.install import install, uninstall
from inlay.model.seams.accelerate import brought_in, keep_resident
from inlay.model.trunk import keep_trunk_free_of_gradients
from inlay.storage.bitsandbytes import tell_dtype
from inlay.storage.parameters import Parameter
from inlay.storage.registry import frozen, matrix_kind


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
    """Ids whose rows train, by the module that they are rows of."""


@dataclass
class Registry:
    """The adapters of one model, which of them are active, and what the model was before."""

    adapters: dict[str, Attached] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    required_grad: dict[str, bool] = field(default_factory=dict)
    prompt: PromptHook | None = None
    notes: tuple[str, ...] = ()
    """What is to be known of the fast paths that step aside on this model."""
    watch: Watch | None = None
    classes: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    """Modules without tensors of adapters whose class was changed, and the class they had."""


@gains
@torch.inference_mode(False)
def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    layers: str | Iterable[int] | None = None,
    modules_to_save: Sequence[str] = (),
    trainable_tokens: Tokens = (),
    name: str = "default",
    seed: int = 0,
) -> nn.Module:
    """Put a method on a model in place, freeze the rest, and return the model.

    The first adapter becomes active; later ones wait for `use`. Its tensors are stored in fp32
    (fp64 on an fp64 model); the model computes the same outputs as before, until it is trained.

    Args:
        model: any module whose layers are linear, embedding, convolution, attention or
            transformers Conv1D, or that holds experts' weights in one parameter.
        method: what to train, for example `LoRA(rank=16)`.
        targets: the method's default when None; `all-linear`, a group, names, suffixes, regexes.
        exclude: names, suffixes or regexes to leave out, with all that lies below them.
        layers: Transformer block numbers, as integers or as `0-3,8`.
        modules_to_save: modules trained whole beside the adapter, such as a new classifier; the
            method does not go to them.
        trainable_tokens: ids of tokens whose rows of the input embedding train beside the adapter,
            and of the head where it is tied; or ids by the name of an embedding or a head.
        name: the adapter's name on this model.
        seed: the seed of the adapter's initial values.

    Raises:
        TargetError: a target matched nothing that this method can adapt.
        AdapterError: the name is taken, or the method does not fit the model.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> from inlay.methods.lora import LoRA
    >>> sum(p.requires_grad for p in attach(model, LoRA(rank=2)).parameters())
    2
    """
    registry = registry_of(model) or Registry()
    check_name(name, registry)
    wanted = tuple(layers) if layers is not None and not isinstance(layers, str) else layers
    tell_dtype(model)
    saved = trained_modules(model, modules_to_save)
    with disabled(model) if registry.adapters else nullcontext():
        places, found = places_for(model, method, targets, exclude, wanted, modules_to_save, seed)
        rows, tokens = token_rows(model, trainable_tokens, saved)
    for module_name, copies in saved.items():
        places.setdefault(module_name, Place(None, Params({}))).add(copies)
    check_apart(rows, found)
    for module_name, copies in rows.items():
        places.setdefault(module_name, Place(None, Params({}))).add(copies)
    for module_name in places:
        check_names_free(unwrapped(model.get_submodule(module_name)), module_name)
    if isinstance(method, PromptMethod):
        hook = registry.prompt or prompt_hook(model)
        hook.check(method)
        with disabled(model) if registry.adapters else nullcontext(), embedding_in(model):
            params = method.init(model, torch.Generator().manual_seed(seed))
        keep_resident(params)
        hook.add(name, method, params)
        registry.prompt = hook
    if not registry.adapters:
        registry.required_grad = {n: p.requires_grad for n, p in model.named_parameters()}
        registry.notes = install(model)
        hold_statistics(model)
    for module_name, place in places.items():
        put(unwrapped(model.get_submodule(module_name)), place, name)
    registry.adapters[name] = Attached(
        name=name,
        method=method,
        targets=described(targets if targets is not None else method.own_targets),
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
        layers=wanted,
        modules_to_save=tuple(modules_to_save),
        found=found,
        trainable_tokens=tokens,
    )
    model.__dict__["inlay"] = registry
    guard(model)
    say_shared(place.params for place in places.values())
    answer_for(model)
    keep_trunk_free_of_gradients(model)
    set_trained(model, (name,), False)
    return use(model, *(registry.active or (name,)))


def embedding_in(model: nn.Module) -> AbstractContextManager[None]:
    """Have the token embedding's rows in place, which prompts start from."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return nullcontext() if embedding is None else brought_in(embedding)


def put(module: nn.Module, place: Place, name: str) -> None:
    """Put one adapter's tensors on one module."""
    base = frozen(module) if matrix_kind(module) else None
    layer = become_adapted(module, base)
    keep_resident(place.params)
    layer.adapters[name] = place.params
    layer.methods[name] = place.method
    if isinstance(place.method, WeightMethod) and base is not None:
        note(place.method, place.params, base)
    if place.parts:
        layer.part_methods[name] = place.parts
        for parameter in place.parts:
            layer.part_views.setdefault(parameter, Parameter(layer, parameter))


@looks_through
def use(model: nn.Module, *names: str) -> nn.Module:
    """Make exactly these adapters active, applied in this order, and train only them.

    Raises:
        AdapterError: no adapter has one of the names, or they cannot act together.
    """
    registry = required_registry(model)
    for name in names:
        check_known(name, registry)
    if len(set(names)) < len(names):
        raise AdapterError(f"an adapter is named twice in use({', '.join(names)})")
    check_order(model, names)
    for _, module in own_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
    set_trained(model, registry.active, False)
    registry.active = names
    activate(model, registry, names)
    set_trained(model, names, True)
    watch(model, registry)
    return model


def watch(model: nn.Module, registry: Registry) -> None:
    """Watch whether the active adapters act, from their first passes on."""
    if registry.watch is not None:
        registry.watch.end()
    places = [place for name in registry.active for place in adapter_places(model, name)]
    params: dict[str, list[Params]] = {}
    for name, here in places:
        params.setdefault(name, []).append(here)
    registry.watch = Watch(model, params) if params else None


def set_trained(model: nn.Module, names: tuple[str, ...], wanted: bool) -> None:
    """Say whether some adapters' tensors train."""
    for name in names:
        for _, params in adapter_places(model, name):
            params.requires_grad_(wanted)


@looks_through
@contextmanager
def disabled(model: nn.Module) -> Generator[nn.Module]:
    """Run the base model: no adapter acts inside the `with` block; safe to nest."""
    registry = required_registry(model)
    before = {layer: layer.active for layer in adapted_layers(model)}
    prompt = registry.prompt.active if registry.prompt else None
    activate(model, registry, ())
    try:
        yield model
    finally:
        for layer, active_here in before.items():
            layer.active = active_here
        if registry.prompt:
            registry.prompt.active = prompt


@looks_through
@contextmanager
def whole_outputs(model: nn.Module) -> Generator[None]:
    """Let an encoder's outputs keep the places of virtual tokens inside the `with` block."""
    registry = registry_of(model)
    hook = registry.prompt if registry else None
    if hook is None:
        yield
        return
    before, hook.whole = hook.whole, True
    try:
        yield
    finally:
        hook.whole = before


@looks_through
def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter, or all, off the model unmerged; the base is what it was, bit for bit."""
    registry = required_registry(model)
    if name is not None:
        check_known(name, registry)
    if registry.watch is not None:
        registry.watch.end()
    for each in [name] if name is not None else list(registry.adapters):
        remove(model, registry, each)
    if registry.adapters:
        return use(model, *(n for n in registry.active if n in registry.adapters))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(registry.required_grad.get(parameter_name, False))
    for module, cls in registry.classes:
        change_class(module, cls)
    del model.__dict__["inlay"]
    unguard(model)
    stop_answering(model)
    release_statistics(model)
    uninstall(model)
    model.__dict__.pop("enable_input_require_grads", None)
    return model


def remove(model: nn.Module, registry: Registry, name: str) -> None:
    """Drop one adapter's tensors everywhere."""
    for layer in list(adapted_layers(model)):
        if name in layer.adapters:
            del layer.adapters[name]
            del layer.methods[name]
            layer.part_methods.pop(name, None)
            layer.active = tuple(n for n in layer.active if n != name)
        if not len(layer.adapters):
            become_original(layer)
    if registry.prompt and registry.prompt.remove(name):
        registry.prompt = None
    del registry.adapters[name]


def activate(model: nn.Module, registry: Registry, names: tuple[str, ...]) -> None:
    """Set which adapters act at every layer."""
    for layer in adapted_layers(model):
        layer.active = tuple(n for n in names if n in layer.adapters)
    if registry.prompt:
        prompts = [n for n in names if n in registry.prompt.methods]
        registry.prompt.active = prompts[0] if prompts else None


@looks_through
def adapters(model: nn.Module) -> dict[str, Attached]:
    """Return the adapters on a model by name; empty when there is none."""
    registry = registry_of(model)
    return dict(registry.adapters) if registry else {}


@looks_through
def notes(model: nn.Module) -> tuple[str, ...]:
    """Return what is to be known of the fast paths that stepped aside on a model."""
    registry = registry_of(model)
    return registry.notes if registry else ()


@looks_through
def active(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the active adapters, in order."""
    registry = registry_of(model)
    return registry.active if registry else ()


@looks_through
def adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Every layer of the model that carries adapters."""
    return (m for _, m in own_modules(model) if isinstance(m, AdaptedLayer))


@looks_through
def adapter_places(model: nn.Module, name: str) -> Iterator[tuple[str, Params]]:
    """Every place that one adapter has tensors at, with them; "" is the whole model.

    A place is a module's name, or that of one parameter of it.
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
    """Every place of one adapter: module name, tensors, the method there, the layer's kind."""
    check_known(name, required_registry(model))
    for module_name, params in adapter_places(model, name):
        module, parameter = module_at(model, module_name)
        if parameter is not None:
            assert isinstance(module, AdaptedLayer)
            yield module_name, params, module.part_methods[name][parameter], "linear"
            continue
        method = module.methods[name] if isinstance(module, AdaptedLayer) else None
        if method is None and isinstance(adapters(model)[name].method, PromptMethod):
            method = adapters(model)[name].method if not module_name else None
        yield module_name, params, method, matrix_kind(module)


@looks_through
def registry_of(model: nn.Module) -> Registry | None:
    """Return the model's adapters, or None when it has none."""
    return model.__dict__.get("inlay")


@looks_through
def required_registry(model: nn.Module) -> Registry:
    """Return the model's adapters; raise when it has none."""
    registry = registry_of(model)
    if registry is None:
        raise AdapterError(f"the {type(model).__name__} has no adapter; call inlay.attach first")
    return registry


def check_name(name: str, registry: Registry) -> None:
    """Raise unless the name is new and can name a module."""
    if name in registry.adapters:
        raise AdapterError(f"the model already has an adapter named {name!r}; choose another name")
    if not name or "." in name or name.strip() != name:
        raise AdapterError(f"an adapter's name must be non-empty, without dots: {name!r} is not")
    if name in dir(nn.ModuleDict):
        raise AdapterError(f"an adapter cannot be named {name!r}, a word torch uses itself")


def check_known(name: str, registry: Registry) -> None:
    """Raise unless the model has an adapter of this name."""
    if name not in registry.adapters:
        have = ", ".join(registry.adapters)
        hint = did_you_mean(name, registry.adapters)
        raise AdapterError(f"the model has no adapter named {name!r}; it has {have}.{hint}")


def check_order(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raise when a method that was computed from the base would stand on another adapter."""
    registry = required_registry(model)
    prompts = [n for n in names if isinstance(registry.adapters[n].method, PromptMethod)]
    if len(prompts) > 1:
        raise AdapterError(f"only one prompt adapter can act at a time, not {', '.join(prompts)}")
    for layer in adapted_layers(model):
        here = [n for n in names if isinstance(layer.methods.get(n), WeightMethod)]
        held = {n: layer.params(n) for n in names if n in layer.adapters}
        copied = [n for n, params in held.items() if "weight" in params._parameters]
        for name in here:
            method = layer.methods[name]
            if isinstance(method, WeightMethod) and method.reads_base:
                check_reads_base(name, method, here[0], copied)
        for parameter in layer.part_views:
            at = [n for n in names if parameter in layer.part_methods.get(n, {})]
            copied = [n for n, params in held.items() if parameter in params._parameters]
            for name in at:
                if layer.part_methods[name][parameter].reads_base:
                    check_reads_base(name, layer.part_methods[name][parameter], at[0], copied)


def check_reads_base(name: str, method: Method, first: str, copied: Sequence[str]) -> None:
    """Raise when what an adapter was computed from is not the weight that it acts on."""
    if copied:
        raise AdapterError(
            f"adapter {name!r} ({method.name}) was computed from the base weight, and "
            f"{copied[0]!r} has a trained copy of that weight: they cannot act together"
        )
    if name != first:
        raise AdapterError(
            f"adapter {name!r} ({method.name}) was computed from the base weight and must "
            f"come first: write use(model, {name!r}, {first!r})"
        )


def described(targets: str | Sequence[str]) -> str | tuple[str, ...]:
    """Return a target specification in the form it is saved in."""
    return targets if isinstance(targets, str) else tuple(targets)
