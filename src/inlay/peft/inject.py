"""HF PEFT's `inject_adapter_in_model`: an adapter set into a model without a wrapper."""

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

TABLES = ("lora_", "ia3_", "ln_tuning_")
"""How the names of a method's tensors at a module begin."""


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
        peft_config = targeting(peft_config, model, state_dict)
    tuner = Tuner(model)
    tuner.peft_config = dict(vars(model).get("peft_config") or {})
    tuner.add(adapter_name, peft_config, True, low_cpu_mem_usage)
    vars(model)["peft_config"] = tuner.peft_config
    return model


def targeting(config: PeftConfig, model: nn.Module, state: Mapping[str, Tensor]) -> PeftConfig:
    """Return a configuration whose targets are the modules that an adapter's state has."""
    names = {name for name, _ in model.named_modules() if name}
    found: Any = copy.deepcopy(config)
    if getattr(found, "target_parameters", None):
        raise AdapterError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses "
            "`target_parameters`, which its keys cannot tell from modules; leave the state_dict out"
        )
    keys = [key.removeprefix("base_model.model.").split(".") for key in state]
    places = {".".join(k[:n]) for k in keys for n in range(1, len(k)) if k[n].startswith(TABLES)}
    modules = places & names
    if not modules:
        raise AdapterError(
            "the state_dict given names no module of this model: it has keys such as "
            f"{next(iter(state), 'none')}"
        )
    warn_of_others(config, model, modules)
    found.target_modules, found.exclude_modules = modules, None
    return found


def warn_of_others(config: PeftConfig, model: nn.Module, found: set[str]) -> None:
    meant: Any = prepared(config, model)
    names = (name for name, module in model.named_modules() if kind(module))
    asked = {name for name in names if check_target_module_exists(meant, name)}
    for source, others in (("PEFT config", asked - found), ("state_dict", found - asked)):
        if others:
            warnings.warn(
                "While injecting the PEFT adapters, an inconsistency was discovered between the "
                "PEFT config and the provided state_dict. This is not necessarily an issue and can "
                "be ignored if this was the intent. The "
                f"{source} contained these additional target "
                f"modules: {sorted(others)}. ",
                RuntimeWarning,
                stacklevel=4,
            )
