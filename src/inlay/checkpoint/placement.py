"""Where an adapter goes, by module names, as Inlay and HF PEFT write it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from inlay.checkpoint.fingerprint import base_name
from inlay.errors import CheckpointError
from inlay.methods.base import Method, PromptMethod, attention_shape
from inlay.model.adapters.copies import own_parameters
from inlay.model.adapters.entries import Entry, entries
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.places import module_at
from inlay.model.adapters.selected import own_parameters
from inlay.model.adapters.targets import BEYOND, matches, places_in
from inlay.model.seams.transformers import family_of_experts

RENAMED: dict[str, dict[str, str]] = {
    "mixtral": {
        "gate": "gate.weight",
        "w1": "gate_up_proj",
        "w3": "gate_up_proj",
        "w2": "down_proj",
    },
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
"""Family -> a layer's name -> the parameter that HF PEFT from 0.19 on puts in its place.

It does so for every target that ends in the name, a shared expert's or a dense block's too, and
for LoRA alone.
"""


def renamed(model: nn.Module) -> Mapping[str, str]:
    """Return which names HF PEFT takes for experts on this model; none on most models."""
    return RENAMED.get(family_of_experts(getattr(model, "config", None)) or "", {})


def suffixes(names: Sequence[str], everything: Iterable[str]) -> list[str] | str:
    """Return the shortest dotted suffixes that mean exactly these modules, in their order.

    Where one module's whole name is a suffix of another's, no suffix can tell them apart; the
    result is then a regular expression for the whole names.

    >>> suffixes(["a.q", "b.q"], ["a", "a.q", "a.k", "b", "b.q"])
    ['q']
    """
    wanted = set(names)
    too_wide = {s for name in everything if name not in wanted for s in endings(name)}
    found: dict[str, None] = {}
    for name in names:
        suffix = next((s for s in endings(name) if s not in too_wide), None)
        if suffix is None:
            return Entry.exactly(names)
        found[suffix] = None
    return list(found)


def endings(name: str) -> list[str]:
    """Return every dotted suffix of a name, the shortest first.

    >>> endings("a.b.c")
    ['c', 'b.c', 'a.b.c']
    """
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def names_of(model: nn.Module) -> list[str]:
    """Return the names of the model's own modules, adapters' tensors left out."""
    return [name for name, _ in own_modules(model) if name]


def place_names(model: nn.Module) -> list[str]:
    """Return every name that a target can mean: modules, parameters, experts' former names."""
    return [name for name in places_in(model, BEYOND).everything() if name]


def meant(target: str | Sequence[str], name: str) -> bool:
    """Say whether HF PEFT takes a module for one of its targets."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == t or name.endswith("." + t) for t in target)


def under_any(name: str, roots: Collection[str]) -> bool:
    """Say whether a module is one of `roots` or lies below one."""
    return any(name == root or name.startswith(root + ".") for root in roots)


def saved_roots(model: nn.Module, attached: Attached) -> tuple[str, ...]:
    """Return the whole names of the modules an adapter trains beside its method."""
    names = names_of(model)
    return tuple(n for n in names if any(e.matches(n) for e in entries(attached.modules_to_save)))


def peft_placement(
    model: nn.Module, method: Method, targets: Sequence[str], saved: Sequence[str]
) -> dict[str, Any]:
    """Return HF PEFT's options that say where an adapter goes on this model."""
    if isinstance(method, PromptMethod):
        return prompt_dimensions(model, method)
    modules, parameters = divided(model, method, targets)
    found = {
        "target_modules": suffixes(modules, names_of(model)) if modules else [],
        "modules_to_save": list(saved) or None,
    }
    if parameters:
        known = [f"{n}.{k}" for n, m in own_modules(model) for k, _ in own_parameters(m)]
        short = suffixes(parameters, known)
        found["target_parameters"] = parameters if isinstance(short, str) else short
    return found


def divided(
    model: nn.Module, method: Method, targets: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the modules and the parameters that HF PEFT is to be told of.

    A layer whose name it would take for an expert's is told by its weight's name.
    """
    modules: list[str] = []
    parameters: list[str] = []
    for name in targets:
        _, parameter = module_at(model, name)
        if parameter is not None:
            parameters.append(name)
        elif told_by_weight(model, method, name):
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return modules, parameters


def told_by_weight(model: nn.Module, method: Method, name: str) -> bool:
    """Say whether HF PEFT takes a layer's name for an expert's, and has another way to it."""
    taken = method.peft_type == "LORA" and name.rpartition(".")[2] in renamed(model)
    return taken and not method.peft_fixed


def prompt_dimensions(model: nn.Module, method: PromptMethod) -> dict[str, Any]:
    """Return the sizes of the model that HF PEFT records for a prompt.

    Raises:
        CheckpointError: its configuration does not say them.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(text, "num_attention_heads"):
        raise CheckpointError(
            f"the configuration of this {type(model).__name__} does not say num_attention_heads, "
            "hidden_size and num_hidden_layers, which a prompt is made for; give it one of "
            "transformers' configurations"
        )
    heads = text.num_attention_heads
    width = text.hidden_size
    if method.peft_type == "PREFIX_TUNING":
        _, heads, head_width = attention_shape(config)
        width = heads * head_width
    return {
        "num_attention_heads": heads,
        "num_layers": text.num_hidden_layers,
        "num_transformer_submodules": submodules_of(config, method),
        "token_dim": width,
    }


def submodules_of(config: Any, method: PromptMethod) -> int:
    """Return for how many parts of a model HF PEFT keeps a prompt; a prefix of two is kept once."""
    if not getattr(config, "is_encoder_decoder", False):
        return 1
    return 2 if method.peft_type == "PREFIX_TUNING" else method.rows // method.tokens


def described(model: nn.Module) -> str:
    """Return a model's class and the name it was loaded under."""
    name = base_name(model)
    return type(model).__name__ + (f" ({name})" if name else "")
