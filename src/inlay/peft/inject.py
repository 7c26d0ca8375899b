"""HF PEFT's low-level way: an adapter set into a model that stays the model it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from inlay.model.adapters.registry import adapters
from inlay.peft.configs import check_config, prepared
from inlay.peft.errors import AdapterError
from inlay.peft.seam import check_target_module_exists
from inlay.peft.tuner import Tuner
from inlay.storage.registry import kind


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model in place and return the model itself, not a wrapper.

    Args:
        peft_config: one of HF PEFT's configurations, not of a prompt.
        model: the model; changed in place.
        adapter_name: the adapter's name on it.
        low_cpu_mem_usage: True leaves its tensors on no device, until values are loaded into it.
        state_dict: an adapter's state, whose keys say which modules are meant.

    Raises:
        AdapterError: a prompt, a name that is taken, or an option that Inlay does not have.
        TargetError: a target matched nothing that this method can adapt.
    """
    check_config(peft_config)
    if peft_config.is_prompt_learning:
        raise AdapterError(
            "`create_and_replace` does not support prompt learning: a prompt is set into no "
            "module; use get_peft_model for it"
        )
    if adapter_name in adapters(model):
        raise AdapterError(f"the model already has an adapter named {adapter_name!r}")
    if state_dict is not None:
        peft_config = aimed(peft_config, model, state_dict)
    tuner = Tuner(model)
    tuner.peft_config = dict(vars(model).get("peft_config") or {})
    tuner.add(adapter_name, peft_config, True, low_cpu_mem_usage)
    vars(model)["peft_config"] = tuner.peft_config
    return model


def aimed(config: PeftConfig, model: nn.Module, state: Mapping[str, Tensor]) -> PeftConfig:
    """Return a configuration whose targets are the modules that an adapter's state has.

    Raises:
        AdapterError: the state has none of the model's modules.
    """
    names = {name for name, _ in model.named_modules() if name}
    found: Any = copy.deepcopy(config)
    if getattr(found, "target_parameters", None):
        raise AdapterError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses "
            "`target_parameters`, which its keys cannot tell from modules; leave the state_dict out"
        )
    keys = [key.removeprefix("base_model.model.").split(".") for key in state]
    places = {".".join(k[:n]) for k in keys for n in range(1, len(k)) if is_tensor_of(k[n])}
    there = sorted(places & names)
    if not there:
        raise AdapterError(
            "the state_dict given names no module of this model: it has keys such as "
            f"{next(iter(state), 'none')}"
        )
    warn_of_others(config, model, set(there))
    found.target_modules, found.exclude_modules = set(there), None
    return found


def warn_of_others(config: PeftConfig, model: nn.Module, there: set[str]) -> None:
    """Say where a configuration and an adapter's state do not mean the same modules."""
    meant: Any = prepared(config, model)
    names = (name for name, module in model.named_modules() if kind(module))
    asked = {name for name in names if check_target_module_exists(meant, name)}
    for what, others in (("PEFT config", asked - there), ("state_dict", there - asked)):
        if others:
            warnings.warn(
                "While injecting the PEFT adapters, an inconsistency was discovered between the "
                "PEFT config and the provided state_dict. This is not necessarily an issue and can "
                f"be ignored if this was the intent. The {what} contained these additional target "
                f"modules: {sorted(others)}. ",
                RuntimeWarning,
                stacklevel=4,
            )


def is_tensor_of(word: str) -> bool:
    """Say whether a word of a key begins what a method has at a module."""
    return word.startswith(("lora_", "ia3_", "ln_tuning_"))
