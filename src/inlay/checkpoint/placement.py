"""Where an adapter goes, by module names, as Inlay and HF PEFT write it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from inlay.checkpoint.fingerprint import base_name
from inlay.errors import CheckpointError
from inlay.methods.base import Method, PromptMethod
from inlay.methods.models import attention_shape
from inlay.model.adapters.copies import own_parameters
from inlay.model.adapters.entries import Entry, entries
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.places import BEYOND, module_at, places_in
from inlay.model.adapters.registry import Attached
from inlay.model.seams.transformers import family_of_experts

EXPERT_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""Family -> the layers' names that HF PEFT from 0.19 on reads as parameters of the experts.

It does so for every target that ends in the name, a shared expert's or a dense block's too, and
for LoRA alone.
"""


def expert_names(model: nn.Module) -> Collection[str]:
    """Return the names of layers that HF PEFT reads as experts' on this model."""
    return EXPERT_NAMES.get(family_of_experts(getattr(model, "config", None)) or "", frozenset())


def suffixes(names: Sequence[str], everything: Iterable[str]) -> list[str] | str:
    """Return the shortest dotted suffixes that mean exactly these modules, in their order.

    Where one module's whole name is a suffix of another's, no suffix can tell them apart; the
    result is then a regular expression for the whole names.

    >>> suffixes(["a.q", "b.q"], ["a", "a.q", "a.k", "b", "b.q"])
    ['q']
    """
    meant_names = set(names)
    too_wide = {s for name in everything if name not in meant_names for s in endings(name)}
    found: dict[str, None] = {}
    for name in names:
        suffix = next((s for s in endings(name) if s not in too_wide), None)
        if suffix is None:
            return Entry.exactly(names)
        found[suffix] = None
    return list(found)


def exact_targets(names: Sequence[str], everything: Iterable[str]) -> str | tuple[str, ...]:
    found = suffixes(names, everything)
    return found if isinstance(found, str) else tuple(found)


def endings(name: str) -> list[str]:
    """Return every dotted suffix of a name, the shortest first.

    >>> endings("a.b.c")
    ['c', 'b.c', 'a.b.c']
    """
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def names_of(model: nn.Module) -> list[str]:
    """Return the names of the model's own modules, without adapters' tensors."""
    return [name for name, _ in own_modules(model) if name]


def place_names(model: nn.Module) -> list[str]:
    """Return every name that a target can mean: modules, parameters, former names of experts."""
    return [name for name in places_in(model, BEYOND).everything() if name]


def meant(target: str | Sequence[str], name: str) -> bool:
    """Return whether HF PEFT takes a module for one of its targets."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == t or name.endswith("." + t) for t in target)


def under_any(name: str, roots: Collection[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def saved_roots(model: nn.Module, attached: Attached) -> tuple[str, ...]:
    names = names_of(model)
    return tuple(n for n in names if any(e.matches(n) for e in entries(attached.modules_to_save)))


def peft_placement(
    model: nn.Module, method: Method, targets: Sequence[str], saved: Sequence[str]
) -> dict[str, Any]:
    if isinstance(method, PromptMethod):
        return prompt_dimensions(model, method)
    modules, parameters = modules_and_parameters(model, method, targets)
    found = {
        "target_modules": suffixes(modules, names_of(model)) if modules else [],
        "modules_to_save": list(saved) or None,
    }
    if parameters:
        known = [f"{n}.{k}" for n, m in own_modules(model) for k, _ in own_parameters(m)]
        short = suffixes(parameters, known)
        found["target_parameters"] = parameters if isinstance(short, str) else short
    return found


def modules_and_parameters(
    model: nn.Module, method: Method, targets: Sequence[str]
) -> tuple[list[str], list[str]]:
    """A layer whose name HF PEFT would read as an expert's is named by its weight."""
    modules: list[str] = []
    parameters: list[str] = []
    for name in targets:
        _, parameter = module_at(model, name)
        if parameter is not None:
            parameters.append(name)
        elif named_by_weight(model, method, name):
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return modules, parameters


def named_by_weight(model: nn.Module, method: Method, name: str) -> bool:
    """Return whether HF PEFT reads a layer's name as an expert's, and can be given its weight's."""
    taken = method.peft_type == "LORA" and name.rpartition(".")[2] in expert_names(model)
    return taken and not method.peft_fixed


def prompt_dimensions(model: nn.Module, method: PromptMethod) -> dict[str, Any]:
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
    """HF PEFT keeps the prefix of an encoder and a decoder once."""
    if not getattr(config, "is_encoder_decoder", False):
        return 1
    return 2 if method.peft_type == "PREFIX_TUNING" else method.rows // method.tokens


def described(model: nn.Module) -> str:
    name = base_name(model)
    return type(model).__name__ + (f" ({name})" if name else "")
