"""An adapter's tensors as a dictionary, under the keys of HF PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from inlay.checkpoint.embeddings import PREFIX
from inlay.checkpoint.folder import Entry
from inlay.checkpoint.placement import described
from inlay.checkpoint.slots import Slot, computed, slots
from inlay.checkpoint.tensors import (
    COMPUTED,
    check_entries,
    listed,
    put_values,
    raise_problems,
    unlike,
)
from inlay.methods.params import Params
from inlay.model.adapters.registry import adapters, registry_of
from inlay.peft.errors import AdapterError, StateError
from inlay.peft.model import PeftModel
from inlay.peft.seam import save_and_load as theirs
from inlay.storage.dtypes import dtype_name

GET: Any = theirs.get_peft_model_state_dict
SET: Any = theirs.set_peft_model_state_dict
"""HF PEFT's own functions, for models with its layers; `take_over` replaces them elsewhere."""


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return one adapter's tensors by the keys that its file has.

    Args:
        model: the model that has the adapter; one with HF PEFT's own layers goes to HF PEFT.
        state_dict: the model's own `state_dict()`, from which to take them; default: as they are.
        adapter_name: which of its adapters.
        unwrap_compiled: whether the model was compiled as a whole.
        save_embedding_layers: must not be True.

    Raises:
        AdapterError: no such adapter, or an option that Inlay does not have.

    >>> from peft import LoraConfig
    >>> from torch import nn
    >>> from inlay.peft import get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    >>> sorted(get_peft_model_state_dict(model))
    ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    if save_embedding_layers is True:
        raise AdapterError("inlay.peft does not have save_embedding_layers=True")
    inner: Any = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    if not is_ours(inner):
        return GET(model, state_dict, adapter_name, unwrap_compiled, save_embedding_layers)
    found = adapter_slots(inner, adapter_name)
    if state_dict is None:
        written = {slot.key: slot.written for slot in found}
    else:
        names = {id(value): name for name, value in inner.state_dict(keep_vars=True).items()}
        given = {slot.key: state_dict[names[id(slot.tensor)]] for slot in found}
        written = {slot.key: slot.layout.written(given[slot.key]) for slot in found}
    return written | computed(base_of(inner), adapter_name, found, written)


def base_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_ours(model: Any) -> bool:
    return isinstance(model, PeftModel) or registry_of(model) is not None


def adapter_slots(model: Any, name: str) -> list[Slot]:
    if isinstance(model, PeftModel):
        model.base_model.check_has(name)
        return slots(model.get_base_model(), name)
    if name not in adapters(model):
        raise AdapterError(f"Adapter {name} not found; the model has {', '.join(adapters(model))}")
    return [replace(slot, key=slot.key.removeprefix(PREFIX)) for slot in slots(model, name)]


@torch.no_grad()
def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Put values into an adapter; every one must have its place and every place its value.

    Returns:
        What torch's `load_state_dict` returns, with nothing missing and nothing unexpected.

    Raises:
        AdapterError: no such adapter, a value that misfits, or an option that Inlay lacks.
    """
    del low_cpu_mem_usage  # Tensors without a device get room where their layers lie.
    if ignore_mismatched_sizes:
        raise AdapterError("inlay.peft does not have ignore_mismatched_sizes=True")
    if not is_ours(model):
        return SET(model, peft_model_state_dict, adapter_name)
    found, values = adapter_slots(model, adapter_name), dict(peft_model_state_dict)
    base = base_of(model)
    entries = {
        key: Entry(dtype_name(value.dtype), tuple(value.shape)) for key, value in values.items()
    }
    about = f"the state given does not fit adapter {adapter_name!r} of this {described(base)}"
    check_entries(found, entries, computed(base, adapter_name, found), {}, about)
    expected = computed(base, adapter_name, found, values)
    raise_problems(about, {COMPUTED: unlike(values, expected)})
    put_values(base, adapter_name, found, values)
    return _IncompatibleKeys([], [])


def get_base_model_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """Return the base model's own state, without adapters and without a merge."""
    with model.base_model.unmerged():
        state: dict[str, Tensor] = model.get_base_model().state_dict()
        ours = adapter_keys(model)
        return {key: value for key, value in state.items() if key not in ours}


def set_base_model_state_dict(
    model: PeftModel, base_model_state_dict: Mapping[str, Tensor], strict: bool = True
) -> Any:
    """Put values into the base model's own tensors.

    Returns:
        What torch's `load_state_dict` returns, adapters' keys left out.

    Raises:
        StateError: with `strict`, a key is missing or not the base's.
    """
    with model.base_model.unmerged():
        ours = adapter_keys(model)
        found = model.get_base_model().load_state_dict(base_model_state_dict, strict=False)
    missed = [key for key in found.missing_keys if key not in ours]
    unknown = list(found.unexpected_keys)
    if strict and (missed or unknown):
        parts = (("Missing key(s)", missed), ("Unexpected key(s)", unknown))
        said = "; ".join(f"{what}: {listed(keys)}" for what, keys in parts if keys)
        raise StateError(
            f"the state given is not this {described(model.get_base_model())}'s. {said}"
        )
    return _IncompatibleKeys(missed, unknown)


def adapter_keys(model: PeftModel) -> set[str]:
    base = model.get_base_model()
    homes = [(name, home) for name, home in base.named_modules() if isinstance(home, Params)]
    found = {f"{name}.{tensor}" for name, home in homes for tensor in home.state_dict()}
    held = {id(t) for _, home in homes for t in (*home.parameters(), *home.buffers())}
    state: dict[str, Tensor] = base.state_dict(keep_vars=True)
    return found | {key for key, value in state.items() if id(value) in held}
