"""HF PEFT's configuration objects: the method and the places on a model that each means."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Any

from peft import PeftConfig, PeftType
from torch import nn

from inlay.checkpoint.peft_options import DEFAULTS, method_in
from inlay.checkpoint.peft_targets import placement_in
from inlay.checkpoint.placement import meant, names_of, prompt_dimensions, suffixes
from inlay.errors import CheckpointError
from inlay.methods.base import Method, PromptMethod, replaced
from inlay.peft.errors import AdapterError, TargetError
from inlay.peft.seam import (
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    PEFT_TYPE_TO_TUNER_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    BaseTuner,
    convert_peft_config_for_transformers,
)

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The heads that HF PEFT trains with the adapter, by task."""

STARTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "LORA": ("init_lora_weights", (True, False, "gaussian")),
    "IA3": ("init_ia3_weights", (True, False)),
    "PREFIX_TUNING": ("init_weights", (None, "zero")),
    "PROMPT_TUNING": ("prompt_tuning_init", ("RANDOM", "SAMPLE_VOCAB", "TEXT")),
}
"""The option that says how a new adapter starts, and its values that Inlay has, by peft_type."""
NEW_ONLY = {"ensure_weight_tying": False, "eva_config": None, "prefix_projection": False}
"""Options without effect on a trained adapter that change how a new one is made."""

LONG = MIN_TARGET_MODULES_FOR_OPTIMIZATION
"""The number of targets from which HF PEFT looks for fewer suffixes that mean the same."""

REMEDY = "leave it at its default, or make this adapter with HF PEFT itself"


def prepared(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Return a copy with HF PEFT's own defaults for this model filled in."""
    check_config(config)
    check_new(config)
    found: Any = copy.deepcopy(config)
    found.base_model_name_or_path = vars(model).get("name_or_path") or None
    heads = HEADS.get(plain(found.task_type) or "", ())
    if heads and hasattr(found, "modules_to_save"):
        given: list[str] = list(found.modules_to_save or ())
        found.modules_to_save = given + [h for h in heads if h not in given]
    if "target_modules" in DEFAULTS[plain(found.peft_type)]:
        convert_experts(found, model)
        fill_targets(found, model)
        shorten_targets(found, model)
        warn_of_idle_exclude(found, model)
    else:
        method = method_of(found)
        assert isinstance(method, PromptMethod)
        if found.num_transformer_submodules is None and plain(found.task_type) == "SEQ_2_SEQ_LM":
            both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
            found.num_transformer_submodules = 2 if both else 1
        for key, value in prompt_dimensions(model, method).items():
            if getattr(found, key) is None:
                setattr(found, key, value)
        if getattr(found, "encoder_hidden_size", 0) is None:
            found.encoder_hidden_size = found.token_dim
    return found


def shorten_targets(config: Any, model: nn.Module) -> None:
    """Replace a long list of targets by the few suffixes that mean the same, as HF PEFT does."""
    targets = config.target_modules
    long = isinstance(targets, list | set) and len(targets) >= LONG
    if long and plain(config.peft_type) != "IA3":  # Its targets include its feedforward_modules.
        names = names_of(model)
        short = suffixes([name for name in names if meant(list(targets), name)], names)
        fewer = isinstance(short, list) and 0 < len(short) < len(targets)
        config.target_modules = set(short) if fewer else targets


def warn_of_idle_exclude(config: Any, model: nn.Module) -> None:
    exclude, target = config.exclude_modules, config.target_modules
    if not exclude or target == "all-linear":
        return
    hit = [name for name in names_of(model) if meant(target or (), name)]
    if hit and not any(meant(exclude, name) for name in hit):
        warnings.warn(
            f"You have passed exclude_modules={exclude} but no modules were excluded. It names "
            f"none of the {len(hit)} modules that target_modules means",
            stacklevel=4,
        )


def convert_experts(config: Any, model: nn.Module) -> None:
    """Convert targets that name experts by their former layer names, as HF PEFT does."""
    given = set(getattr(config, "target_parameters", None) or ())
    if not hasattr(getattr(model, "config", None), "model_type"):
        return
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError as error:
        raise TargetError(f"{type(config).__name__}: {error}") from None
    if getattr(config, "target_parameters", None):
        names = [name for name, _ in model.named_parameters()]
        matched = {
            t for t in config.target_parameters if any(n == t or n.endswith("." + t) for n in names)
        }
        config.target_parameters = sorted(matched | given)


def check_config(config: object) -> None:
    if not isinstance(config, PeftConfig):
        raise AdapterError(
            "an adapter is described by one of HF PEFT's configurations, such as peft.LoraConfig, "
            f"not by a {type(config).__name__}"
        )


def check_new(config: PeftConfig) -> None:
    method_of(config)
    options, where = options_of(config), type(config).__name__
    start, starts = STARTS.get(options["peft_type"], ("", ()))
    if start and options[start] not in starts:
        known = ", ".join(map(repr, starts))
        raise AdapterError(
            f"{where} sets {start} to {options[start]!r}, and inlay has {known}; use one of these, "
            "or make this adapter with HF PEFT itself"
        )
    for key, neutral in NEW_ONLY.items():
        if options.get(key, neutral) != neutral:
            raise AdapterError(f"{where} sets {key}, which inlay does not have; {REMEDY}")
    if getattr(config, "_custom_modules", None):
        raise AdapterError(
            f"{where} registers custom layers (_register_custom_module) in the place of HF PEFT's "
            "own, which inlay does not have; leave them out, or make this adapter with HF PEFT "
            "itself"
        )
    if getattr(getattr(config, "runtime_config", None), "ephemeral_gpu_offload", False):
        raise AdapterError(
            f"{where} sets ephemeral_gpu_offload, which inlay does not have; {REMEDY}"
        )


def method_of(config: PeftConfig) -> Method:
    options = options_of(config)
    try:
        method = method_in(options, type(config).__name__, REMEDY)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
    starts = {"start": "random", "finished": bool(options["inference_mode"])}
    if isinstance(method, PromptMethod):
        return replaced(method, **{k: v for k, v in starts.items() if hasattr(method, k)})
    return method


def placement_of(config: PeftConfig, method: Method, model: nn.Module) -> dict[str, Any]:
    """Return `attach`'s arguments for a prepared configuration."""
    try:
        return placement_in(model, method, options_of(config), type(config).__name__)
    except CheckpointError as error:
        raise TargetError(str(error)) from None


def fill_targets(config: Any, model: nn.Module) -> None:
    kind = str(BaseTuner.get_model_config(model).get("model_type", "custom"))
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(plain(config.peft_type))]
    ia3 = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    targets: Mapping[str, Any] = getattr(tuner, "target_module_mapping", ia3)
    only_parameters = bool(getattr(config, "target_parameters", None)) and kind not in targets
    if config.target_modules is None and not only_parameters:
        config.target_modules = default_for(targets, kind, "target_modules", config, model)
    if getattr(config, "feedforward_modules", ()) is None:
        mapping = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
        config.feedforward_modules = default_for(
            mapping, kind, "feedforward_modules", config, model
        )


def default_for(
    mapping: Mapping[str, Any], kind: str, option: str, config: Any, model: nn.Module
) -> str | set[str]:
    if kind not in mapping:
        some = ", ".join(names_of(model)[-3:])
        raise TargetError(
            f"Please specify `{option}` in `peft_config`: the {type(config).__name__} has none, "
            f"and HF PEFT has no default for a model of type {kind!r}; this one has modules such "
            f"as {some}"
        )
    return mapping[kind] if isinstance(mapping[kind], str) else set(mapping[kind])


def options_of(config: PeftConfig) -> dict[str, Any]:
    return {key: plain(value) for key, value in config.to_dict().items()}


def plain(value: Any) -> Any:
    """Return a value as JSON has it: sets as sorted lists, members of an enumeration as text."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def recorded_of(config: PeftConfig, model: nn.Module) -> dict[str, Any]:
    """Return the options to save with an adapter that do not change what it computes."""
    options = options_of(config)
    keys = ("task_type", "revision", "base_model_name_or_path")
    found = {key: options[key] for key in keys if options.get(key) is not None}
    if options.get("task_type") is None:
        cls = getattr(type(model), "original", type(model))
        base = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
        found |= {"task_type": None, "auto_mapping": base}
    return found
