"""Attach, use, disable, detach: the verbs that put adapters on a model and take them off."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from inlay.errors import AdapterError
from inlay.methods.base import Method, Params, PromptMethod, WeightMethod
from inlay.model.adapters.change_class import change_class
from inlay.model.adapters.copies import mark_shared, trained_modules
from inlay.model.adapters.create import Place, places_for
from inlay.model.adapters.derived import note
from inlay.model.adapters.entries import entries
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.layer_class import become_adapted, become_original, check_names_free
from inlay.model.adapters.model_methods import override_methods
from inlay.model.adapters.prompts import prompt_hook
from inlay.model.adapters.registry import (
    Attached,
    Registry,
    activate,
    adapted_layers,
    adapter_places,
    check_known,
    check_new_name,
    layers_inactive,
    registry_of,
    required_registry,
    restore_overridden,
)
from inlay.model.adapters.running_statistics import hold_statistics, release_statistics
from inlay.model.adapters.tokens import Tokens, check_disjoint, input_embeddings, token_rows
from inlay.model.adapters.watch import Watch
from inlay.model.adapters.wrappers import adds_tensors, looks_through, unwrapped
from inlay.model.fast.install import install, uninstall
from inlay.model.seams.accelerate import brought_in, keep_resident
from inlay.storage.bitsandbytes import forget_dtype, tell_dtype
from inlay.storage.parameters import Parameter
from inlay.storage.registry import frozen, matrix_kind


@adds_tensors
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
    check_new_name(name, registry)
    blocks = tuple(layers) if layers is not None and not isinstance(layers, str) else layers
    tell_dtype(model)
    saved = trained_modules(model, modules_to_save)
    with base_alone(model):
        places, found = places_for(model, method, targets, exclude, blocks, modules_to_save, seed)
        rows, tokens = token_rows(model, trainable_tokens, saved)
    check_disjoint(rows, found)
    for module_name, copies in (*saved.items(), *rows.items()):
        places.setdefault(module_name, Place()).add(copies)
    for module_name in places:
        check_names_free(unwrapped(model.get_submodule(module_name)), module_name)
    if isinstance(method, PromptMethod):
        add_prompt(model, registry, name, method, seed)
    if not registry.adapters:
        prepare(model, registry)
    for module_name, place in places.items():
        put(unwrapped(model.get_submodule(module_name)), place, name)
    mark_shared(place.params for place in places.values())
    asked = method.own_targets if targets is None else targets
    registry.adapters[name] = Attached(
        name=name,
        method=method,
        targets=asked if isinstance(asked, str) else tuple(asked),
        exclude=tuple(map(str, entries(exclude))),
        layers=blocks,
        modules_to_save=tuple(modules_to_save),
        found=found,
        trainable_tokens=tokens,
    )
    vars(model)["inlay"] = registry
    override_methods(model, registry)
    set_trained(model, (name,), False)
    return use(model, *(registry.active or (name,)))


def base_alone(model: nn.Module) -> AbstractContextManager[object]:
    return nullcontext() if registry_of(model) is None else disabled(model)


def add_prompt(
    model: nn.Module, registry: Registry, name: str, method: PromptMethod, seed: int
) -> None:
    hook = registry.prompt or prompt_hook(model)
    hook.check(method)
    embedding = input_embeddings(model)
    offloaded = nullcontext() if embedding is None else brought_in(embedding)
    with base_alone(model), offloaded:  # initial values are copied from the embedding's rows
        params = method.init(model, torch.Generator().manual_seed(seed))
    keep_resident(params)
    hook.add(name, method, params)
    registry.prompt = hook


def prepare(model: nn.Module, registry: Registry) -> None:
    """Make a model ready for its first adapter, and note what `detach` is to give back."""
    registry.required_grad = {n: p.requires_grad for n, p in model.named_parameters()}
    registry.notes = install(model)
    hold_statistics(model)


def put(module: nn.Module, place: Place, name: str) -> None:
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
    if registry.watch is not None:
        registry.watch.end()
    params: dict[str, list[Params]] = {}
    for name in registry.active:
        for place, here in adapter_places(model, name):
            params.setdefault(place, []).append(here)
    registry.watch = Watch(model, params) if params else None


def set_trained(model: nn.Module, names: tuple[str, ...], trained: bool) -> None:
    for name in names:
        for _, params in adapter_places(model, name):
            params.requires_grad_(trained)


@looks_through
@contextmanager
def disabled(model: nn.Module) -> Generator[nn.Module]:
    """Run the base model: no adapter acts inside the `with` block; safe to nest."""
    prompt = required_registry(model).prompt
    before = prompt.active if prompt else None
    with layers_inactive(model):
        if prompt:
            prompt.active = None
        try:
            yield model
        finally:
            if prompt:
                prompt.active = before


@looks_through
@contextmanager
def whole_outputs(model: nn.Module) -> Generator[None]:
    """Keep the positions of virtual tokens in an encoder's outputs inside the `with` block."""
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
    give_back(model, registry)
    return model


def remove(model: nn.Module, registry: Registry, name: str) -> None:
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


def give_back(model: nn.Module, registry: Registry) -> None:
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(registry.required_grad.get(parameter_name, False))
    for module, cls in registry.classes:
        change_class(module, cls)
    restore_overridden(registry)
    if registry.refusal is not None:
        registry.refusal.remove()
    release_statistics(model)
    uninstall(model)
    forget_dtype(model)
    del vars(model)["inlay"]


def check_order(model: nn.Module, names: tuple[str, ...]) -> None:
    registry = required_registry(model)
    prompts = [n for n in names if isinstance(registry.adapters[n].method, PromptMethod)]
    if len(prompts) > 1:
        raise AdapterError(f"only one prompt adapter can act at a time, not {', '.join(prompts)}")
    for layer in adapted_layers(model):
        held = {n: layer.params(n) for n in names if n in layer.adapters}
        methods = {n: layer.methods.get(n) for n in names}
        check_reads_base(methods, [n for n, p in held.items() if "weight" in p._parameters])
        for parameter in layer.part_views:
            parts = {n: layer.part_methods.get(n, {}).get(parameter) for n in names}
            check_reads_base(parts, [n for n, p in held.items() if parameter in p._parameters])


def check_reads_base(methods: Mapping[str, Method | None], copied: Sequence[str]) -> None:
    """Raise when a method was computed from another weight than the one that it acts on.

    `methods` are in order of activation; `copied` have a trained copy of the weight.
    """
    acting = {n: m for n, m in methods.items() if isinstance(m, WeightMethod)}
    for name, method in acting.items():
        if not method.reads_base:
            continue
        if copied:
            raise AdapterError(
                f"adapter {name!r} ({method.name}) was computed from the base weight, and "
                f"{copied[0]!r} has a trained copy of that weight: they cannot act together"
            )
        if name != (first := next(iter(acting))):
            raise AdapterError(
                f"adapter {name!r} ({method.name}) was computed from the base weight and must "
                f"come first: write use(model, {name!r}, {first!r})"
            )
