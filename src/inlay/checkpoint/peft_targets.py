"""Which modules and parameters an HF PEFT configuration means on a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from inlay.checkpoint.peft_options import words
from inlay.checkpoint.placement import (
    described,
    expert_names,
    meant,
    names_of,
    place_names,
    prompt_dimensions,
    suffixes,
    under_any,
)
from inlay.errors import CheckpointError
from inlay.methods.base import Method, PromptMethod
from inlay.model.adapters.copies import own_parameters
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.places import expert_stacks, loose_parameters
from inlay.model.adapters.targets import find_targets
from inlay.storage.convolution import is_convolution
from inlay.storage.parameters import projections
from inlay.storage.registry import matrix_kind

AUTOMATIC = ("classifier", "score", "qa_outputs")
"""Heads that HF PEFT adds to `modules_to_save` by itself, whether the model has them or not."""


def placement_in(
    model: nn.Module, method: Method, config: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return `attach`'s arguments from HF PEFT's options; CheckpointError if one misfits."""
    names = names_of(model)
    saved, tokens = saved_modules(config, names, where), tokens_in(config, where)
    if isinstance(method, PromptMethod):
        check_dimensions(model, method, config, where)
        return {"modules_to_save": saved}
    single = parameter_places(model, config, where)
    if config.get("target_modules") == "all-linear":
        if not config.get("exclude_modules") and not single and not stacks_in(model):
            return {"targets": "all-linear", "modules_to_save": saved, **tokens}
        config = {**config, "target_modules": list(find_targets(model, "all-linear").names)}
    check_no_former_experts(model, config, where)
    asked = config.get("target_modules") not in (None, [], "") or not single
    found = modules_or_warning(config, names, where, single) if asked else []
    if config.get("ensure_weight_tying"):
        found, saved = with_tied(model, found), with_tied(model, saved)
    found += [place for place in single if place not in found]
    return {"targets": suffixes(found, place_names(model)), "modules_to_save": saved, **tokens}


def modules_or_warning(
    config: Mapping[str, Any], names: Sequence[str], where: str, single: Sequence[str]
) -> list[str]:
    """Return the modules targeted; none, with a warning, where only parameters were matched."""
    given = words(config, "target_modules", where)
    entries = [given] if isinstance(given, str) else given
    if not single or any(meant(given, name) for name in names):
        return peft_targets(config, names, where)
    said = "{" + ", ".join(map(repr, entries)) + "}"
    warnings.warn(
        f"target_modules={said} were set but no module was matched. The adapter goes to the "
        "parameters that target_parameters names alone",
        RuntimeWarning,
        stacklevel=2,
    )
    return []


def parameter_places(model: nn.Module, config: Mapping[str, Any], where: str) -> list[str]:
    targets = words(config, "target_parameters", where)
    if isinstance(targets, str):
        raise CheckpointError(f"{where}: target_parameters must be a list, not {targets!r}")
    found: dict[str, None] = {}
    matched: set[str] = set()
    for name, module in own_modules(model):
        for key, _ in own_parameters(module):
            full = f"{name}.{key}" if name else key
            hits = [t for t in targets if full == t or full.endswith("." + t)]
            if hits:
                matched |= set(hits)
                found[place_of_parameter(name, module, key, where)] = None
    idle = [t for t in targets if t not in matched]
    if targets and not matched:
        warn_of_unmatched(model, config, targets, where)
    elif idle:
        raise CheckpointError(
            f"{where}: target_parameters names {', '.join(map(repr, idle))}, and this model has no "
            "such parameter"
        )
    return list(found)


def warn_of_unmatched(
    model: nn.Module, config: Mapping[str, Any], targets: Sequence[str], where: str
) -> None:
    if config.get("target_modules"):
        warnings.warn(
            f"target_parameters={list(targets)} were set but no parameter was matched. The "
            "adapter goes to the modules that target_modules names alone",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    some = [name for name, _ in model.named_parameters()][:3]
    raise CheckpointError(
        "No `target_modules` passed but also no `target_parameters` found. Please check the values "
        f"for these arguments. {where}: target_parameters names {', '.join(map(repr, targets))}, "
        f"and this model has no such parameter; it has some such as {', '.join(some)}"
    )


def place_of_parameter(name: str, module: nn.Module, parameter: str, where: str) -> str:
    """Return the place of a parameter: the layer whose weight it is, or the parameter itself."""
    full = f"{name}.{parameter}" if name else parameter
    if parameter == "weight" and matrix_kind(module) == "linear" and not is_convolution(module):
        return name
    loose = [*loose_parameters(name, module), *expert_stacks(name, module)]
    attention = isinstance(module, nn.MultiheadAttention) and parameter in projections(module)
    if full in loose or attention:
        return full
    raise CheckpointError(
        f"{where}: target_parameters names {full}, a parameter of a {type(module).__name__}; a "
        "method adapts matrices and stacks of them that way, linear layers' weights among them"
    )


def stacks_in(model: nn.Module) -> bool:
    return any(True for n, m in own_modules(model) for _ in expert_stacks(n, m))


def tokens_in(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    value = config.get("trainable_token_indices")
    if not value:
        return {}
    lists: list[Any] = list(value.values()) if isinstance(value, dict) else [value]
    if not all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in lists):
        raise CheckpointError(
            f"{where}: trainable_token_indices must be a list of whole numbers, or such lists by "
            f"the names of modules, not {value!r}"
        )
    return {"trainable_tokens": value}


def peft_targets(config: Mapping[str, Any], names: Sequence[str], where: str) -> list[str]:
    target = words(config, "target_modules", where)
    exclude = words(config, "exclude_modules", where)
    saved = saved_modules(config, names, where)
    blocks = block_numbers(config, where)
    patterns = words(config, "layers_pattern", where)
    try:
        found = [
            name
            for name in names
            if meant(target, name)
            and not (exclude and meant(exclude, name))
            and not under_any(name, saved)
            and (blocks is None or isinstance(target, str) or in_blocks(name, blocks, patterns))
        ]
    except re.error as error:
        raise CheckpointError(f"{where} holds an invalid regular expression: {error}") from None
    if not found:
        raise CheckpointError(f"{where}: {why_none(target, exclude, saved, config, names)}")
    return found


def why_none(
    target: str | Sequence[str],
    exclude: str | Sequence[str],
    saved: Sequence[str],
    config: Mapping[str, Any],
    names: Sequence[str],
) -> str:
    hit = [name for name in names if meant(target, name) and not under_any(name, saved)]
    left_out = [name for name in hit if exclude and meant(exclude, name)]
    one_by_one = [target] if isinstance(target, str) else [[entry] for entry in target]
    every_entry_hits = all(any(meant(entry, name) for name in hit) for entry in one_by_one)
    shown = config.get("target_modules")
    there = f"it has modules such as {', '.join(names[-3:])}"
    if left_out and every_entry_hits:
        return (
            f"All modules were excluded: target_modules {shown} means {', '.join(left_out[:3])}, "
            f"and exclude_modules {config.get('exclude_modules')} takes out all of them"
        )
    if left_out or saved or hit:
        return (
            f"No modules were targeted for adaptation: of target_modules {shown}, this model has "
            "none, or those that it has are excluded, saved whole (modules_to_save), or in no "
            f"block that layers_to_transform names; {there}"
        )
    return (
        f"Target modules {shown} not found in the base model: {there}. The adapter was made for "
        f"{config.get('base_model_name_or_path') or 'another base'}"
    )


def block_numbers(config: Mapping[str, Any], where: str) -> set[int] | None:
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(n, int) for n in numbers):
        raise CheckpointError(f"{where}: layers_to_transform must be whole numbers, not {value!r}")
    return set(numbers)


def in_blocks(name: str, blocks: set[int], patterns: str | Sequence[str]) -> bool:
    """Return whether a module lies in one of these blocks, as HF PEFT numbers them."""
    given = [patterns] if isinstance(patterns, str) else patterns
    rules = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in given] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for m in (re.match(rule, name) for rule in rules) if m), None)
    return match is not None and int(match[1]) in blocks


def saved_modules(config: Mapping[str, Any], names: Sequence[str], where: str) -> list[str]:
    entries = words(config, "modules_to_save", where)
    if isinstance(entries, str):
        raise CheckpointError(f"{where}: modules_to_save must be a list, not {entries!r}")
    for entry in entries:
        if entry not in AUTOMATIC and not any(n.endswith(entry) for n in names):
            raise CheckpointError(
                f"{where}: modules_to_save names {entry!r}, which matches no module of this model"
            )
    found = [n for n in names if any(n.endswith(entry) for entry in entries)]
    return [n for n in found if not under_any(n.rpartition(".")[0], found)]


def with_tied(model: nn.Module, names: Sequence[str]) -> list[str]:
    own = {name: own_parameters(module) for name, module in own_modules(model)}
    shared = {id(p) for name in names for _, p in own[name]}
    return [n for n, ps in own.items() if n in names or any(id(p) in shared for _, p in ps)]


def check_dimensions(
    model: nn.Module, method: PromptMethod, config: Mapping[str, Any], where: str
) -> None:
    for key, here in prompt_dimensions(model, method).items():
        if config.get(key) not in (None, here):
            raise CheckpointError(
                f"{where} says {key} {config[key]!r}, this {described(model)} has {here}: the "
                "adapter was made for another base"
            )


def check_no_former_experts(model: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """transformers 5 joined these layers in a mixture's experts; HF PEFT looks there."""
    targets = config.get("target_modules")
    if config.get("peft_type") != "LORA" or not isinstance(targets, list):
        return
    names = expert_names(model)
    meant = [t for t in targets if isinstance(t, str) and t.rpartition(".")[2] in names]
    if meant:
        raise CheckpointError(
            f"{where} targets {', '.join(sorted(meant))}, which transformers 5 has joined in the "
            f"experts of a {type(model).__name__}: the adapter has the older layout; load it once "
            "with HF PEFT 0.19 or later on transformers 5, call save_pretrained there, and "
            "read that folder"
        )
