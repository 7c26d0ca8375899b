"""Save and load adapters in HF PEFT's layout, read strictly."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from inlay.checkpoint.adapter_file import (
    AdapterFile,
    check_recorded,
    check_same,
    check_size,
    made_for,
    read_adapter,
)
from inlay.checkpoint.embeddings import saved_embeddings
from inlay.checkpoint.fingerprint import DESCRIBED, base_name, description, warn_unfrozen
from inlay.checkpoint.folder import (
    CARD,
    CONFIG,
    EXTRAS,
    TENSORS,
    write_adapter,
)
from inlay.checkpoint.key_conversion import fitted, method_modules
from inlay.checkpoint.metadata import (
    Placement,
    adapter_config,
    adapter_extras,
    card,
    hyperparameters,
    replaced_by,
)
from inlay.checkpoint.peft_differences import warn_where_peft_differs
from inlay.checkpoint.peft_options import WITHOUT_EFFECT
from inlay.checkpoint.peft_targets import placement_in
from inlay.checkpoint.placement import described, exact_targets, names_of, place_names
from inlay.checkpoint.slots import computed, gathered, known, slots
from inlay.checkpoint.tensors import fill, write_tensors
from inlay.errors import CheckpointError, TargetError
from inlay.methods.base import (
    HiddenMethod,
    LowRank,
    Method,
    WeightMethod,
    replaced,
)
from inlay.model.adapters.attach import attach, detach
from inlay.model.adapters.copies import own_parameters
from inlay.model.adapters.entries import entries
from inlay.model.adapters.places import module_at
from inlay.model.adapters.registry import adapters
from inlay.model.adapters.targets import adaptable_kinds, find_targets
from inlay.model.adapters.wrappers import adds_tensors, looks_through


@looks_through
def save_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    *,
    base_model: str | None = None,
    recorded: Mapping[str, Any] | None = None,
    embeddings: bool | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save one adapter in HF PEFT's layout: all of it, or nothing on failure.

    Writes adapter_config.json, adapter_model.safetensors, inlay.json (what HF PEFT's layout has
    no place for) and a model card. They replace an older adapter in the folder.

    Args:
        model: the model that has the adapter.
        directory: the adapter's own folder.
        name: which of the model's adapters.
        base_model: the base's name to record; default: what the model was loaded as.
        recorded: more of HF PEFT's options to record, such as its task type; only those that do
            not change what the adapter computes.
        embeddings: whether to write the base's input embedding and head as well; None: where
            the vocabulary was changed, so that no checkpoint of the base has their rows.
        state: values to write in place of the model's own, by their names in its state, as a
            library has gathered them from several processes.

    Returns:
        The folder.

    Raises:
        CheckpointError: the disk is full, or the adapter holds values that are not finite.
        AdapterError: the model has no such adapter.
    """
    found = gathered(model, slots(model, name), state)
    warn_unfrozen(model)
    attached = adapters(model)[name]
    base = base_model or base_name(model)
    config = adapter_config(model, attached, base) | checked_records(recorded or {})
    differs = warn_where_peft_differs(model, attached, f"the adapter saved in {directory}")
    whole = saved_embeddings(model, attached, embeddings)
    more = {**whole, **computed(model, name, found)}

    def put(folder: Path) -> None:
        write_json(folder / CONFIG, config)
        once = attached.method.peft_type is None
        write_tensors(folder / TENSORS, found, more, shared_once=once)
        write_json(folder / EXTRAS, adapter_extras(model, attached, base, folder, whole))
        count = sum({id(s.tensor): s.tensor.numel() for s in found}.values())
        text = card(attached.method, hyperparameters(attached.method), base, count, differs)
        (folder / CARD).write_text(text, encoding="utf-8")

    write_adapter(Path(directory), put)
    return Path(directory)


def checked_records(recorded: Mapping[str, Any]) -> dict[str, Any]:
    for key in recorded:
        if key not in WITHOUT_EFFECT:
            raise CheckpointError(
                f"{key} says what the adapter computes, so it is written from the adapter itself; "
                "leave it out of recorded"
            )
    return dict(recorded)


@adds_tensors
def load_adapter(
    model: nn.Module, directory: str | Path, name: str = "default", *, seed: int = 0
) -> nn.Module:
    """Attach an adapter from its folder, in place, and return the model.

    Every tensor of the file must have its place and every place its tensor. The first adapter of
    a model becomes active; later ones wait for `use`. On failure the model is what it was.

    Args:
        model: the base model that the adapter was made for.
        directory: a folder that `save_adapter` or HF PEFT wrote.
        name: the adapter's name on this model.
        seed: the seed `attach` starts from, before every value is read from the file.

    Raises:
        CheckpointError: the files are missing, damaged, for another base, or of a kind not known.
        AdapterError: the name is taken.
    """
    warn_of_lost_encoder(put_adapter(model, directory, name, seed), directory)
    return model


def warn_of_lost_encoder(file: AdapterFile, directory: str | Path) -> None:
    if file.folder.extras is None and getattr(file.method, "finished", False):
        warnings.warn(
            f"the adapter in {directory} holds the embeddings that its prompt encoder computed, as "
            "HF PEFT saves them, and not the encoder: it computes the same, and further training "
            "changes these embeddings themselves, as prompt tuning does",
            UserWarning,
            stacklevel=4,
        )


@adds_tensors
def put_adapter(model: nn.Module, directory: str | Path, name: str, seed: int = 0) -> AdapterFile:
    file = read_adapter(directory)
    file = AdapterFile(file.method, fitted(model, file.method, file.folder))
    with unchanged_on_failure(model, name):
        attach_from(model, file, name, seed)
        about = (
            f"the adapter in {file.folder.path} does not fit this {described(model)}; it was made "
            f"for {made_for(file.folder)}"
        )
        fill(model, name, file.folder, about)
        attached = adapters(model)[name]
        if file.folder.extras is None:
            warn_where_peft_differs(model, attached, f"the adapter in {directory}")
        else:
            check_recorded(model, attached, file.folder)
    return file


def reload_adapter(model: nn.Module, directory: str | Path, name: str) -> AdapterFile:
    file, attached = read_adapter(directory), known(model, name)
    check_same(file, attached, directory)
    about = f"the adapter in {directory} does not fit adapter {name!r} of this {described(model)}"
    fill(model, name, fitted(model, file.method, file.folder), about)
    if file.folder.extras is not None:
        check_recorded(model, attached, file.folder)
    return file


def attach_from(model: nn.Module, file: AdapterFile, name: str, seed: int) -> None:
    where = str(file.folder.path / CONFIG)
    try:
        placement = recorded_placement(model, file) or peft_placement_in(model, file, where)
        check_size(model, file, placement)
        method = without_missing_biases(model, file, placement)
        attach(model, method, name=name, seed=seed, **placement)
    except TargetError as error:
        raise CheckpointError(
            f"{where} does not fit this {described(model)}, it was made for "
            f"{made_for(file.folder)}: {error}"
        ) from None
    except re.error as error:
        raise CheckpointError(f"{where} holds an invalid regular expression: {error}") from None


def without_missing_biases(
    model: nn.Module, file: AdapterFile, placement: Mapping[str, Any]
) -> Method:
    """Return the method, without bias training where the model has no such biases."""
    method = file.method
    if not isinstance(method, LowRank) or any(k.endswith("bias") for k in file.folder.tensors):
        return method
    found = find_targets(model, placement["targets"], kinds=adaptable_kinds(method))
    layers = {"lora_only": found.names, "all": names_of(model)}.get(method.bias_training, ())
    biased = any("bias" in dict(own_parameters(module_at(model, n)[0])) for n in layers)
    return method if biased else replaced(method, bias_training="none")


def recorded_placement(model: nn.Module, file: AdapterFile) -> dict[str, Any] | None:
    """Return `attach`'s arguments from inlay.json, for the recorded layers alone; None without."""
    if file.folder.extras is None:
        return None
    try:
        found = json.dumps(file.folder.extras.get("placement"))
        placement = dataclasses.asdict(TypeAdapter(Placement).validate_json(found, strict=True))
        if isinstance(file.method, WeightMethod | HiddenMethod):
            modules = file.folder.extras.get("modules")
            placement |= recorded_targets(model, placement["targets"], modules)
        return placement
    except ValidationError as error:
        raise CheckpointError(
            f"{file.folder.path / EXTRAS} must hold a placement; it is damaged: "
            f"{error.errors()[0]['msg']}"
        ) from None


def recorded_targets(model: nn.Module, targets: Any, modules: Any) -> dict[str, Any]:
    names = place_names(model)
    if not targets or not isinstance(modules, list) or not set(names).issuperset(modules):
        return {}
    if not all(any(entry.matches(name) for entry in entries(targets)) for name in modules):
        return {}
    return {"targets": exact_targets(modules, names)}


def peft_placement_in(model: nn.Module, file: AdapterFile, where: str) -> dict[str, Any]:
    config = file.folder.config
    if config.get("target_modules") is None and not config.get("target_parameters"):
        named = method_modules(file.method, file.folder.tensors)
        config = {**config, "target_modules": named}
    return placement_in(model, file.method, config, where)


@looks_through
def keep_base_description(model: nn.Module, name: str = "default") -> None:
    """Keep a saved adapter's description of its base; call it before the weights are divided."""
    whole = saved_embeddings(model, adapters(model)[name], None)
    vars(model)[DESCRIBED] = description(model, replaced_by(model, name, whole))


@contextmanager
def unchanged_on_failure(model: nn.Module, name: str) -> Generator[None]:
    before = set(adapters(model))
    trains = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        if name in set(adapters(model)) - before:
            detach(model, name)
            for parameter, flag in trains:
                parameter.requires_grad_(flag)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with the keys in the order given, which matters in patterns."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
