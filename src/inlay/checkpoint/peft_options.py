"""HF PEFT's configuration options: their defaults, those Inlay has, those that must be neutral."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from inlay.errors import AdapterError, CheckpointError, did_you_mean
from inlay.methods.catalog import MethodSpec, build_method, catalog, find_method

if TYPE_CHECKING:
    from inlay.methods.base import Method

PEFT_VERSION = "0.21.2"
"""The version whose layout is written."""
COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_version": PEFT_VERSION,
    "revision": None,
    "task_type": None,
}
LAYERS: dict[str, Any] = {
    "exclude_modules": None,
    "modules_to_save": None,
    "target_modules": None,
}
PROMPT: dict[str, Any] = {
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "token_dim": None,
}
LORA: dict[str, Any] = {
    **LAYERS,
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": LORA,
    "IA3": {
        **LAYERS,
        "fan_in_fan_out": False,
        "feedforward_modules": None,
        "init_ia3_weights": True,
    },
    "LN_TUNING": LAYERS,
    "P_TUNING": {
        **PROMPT,
        "encoder_dropout": 0.0,
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    },
    "PREFIX_TUNING": {
        **PROMPT,
        "encoder_hidden_size": None,
        "init_weights": None,
        "prefix_projection": False,
    },
    "PROMPT_TUNING": {
        **PROMPT,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    },
}
"""Every option of the HF PEFT methods that Inlay has, with its default."""
PLACEMENT = frozenset({
    "exclude_modules", "feedforward_modules", "layers_pattern", "layers_to_transform",
    "modules_to_save", "target_modules", "target_parameters", "num_attention_heads", "num_layers",
    "token_dim", "trainable_token_indices",
})  # fmt: skip
"""Options that say where an adapter goes; `placement` reads them."""
WITHOUT_EFFECT = frozenset({
    *COMMON, "peft_type", "encoder_hidden_size", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "init_ia3_weights", "init_weights", "megatron_core",
    "num_transformer_submodules", "prefix_projection", "prompt_tuning_init",
    "prompt_tuning_init_text", "qalora_group_size", "tokenizer_kwargs", "tokenizer_name_or_path",
})  # fmt: skip
"""Options that change how an adapter starts or is named, not what a trained one computes."""
INITS = (True, False, "gaussian", "orthogonal", "eva")
"""LoRA's initialisations that leave the base weights as they are."""


def method_in(config: Mapping[str, Any], where: str, remedy: str | None = None) -> Method:
    """Build the configured method; `where` names the configuration in an error."""
    spec = spec_for(config, where)
    cls = spec.load()
    options = {**DEFAULTS.get(config["peft_type"], {}), **config}
    ours = set(cls.peft_keys.values()) | set(cls.peft_fixed)
    refuse_unknown(options, ours, where, remedy)
    for mine, theirs in cls.peft_keys.items():
        if theirs in PLACEMENT:
            options[theirs] = patterns(options, theirs, where)
        elif theirs in options:
            options[theirs] = checked(spec, mine, theirs, options[theirs], where)
    with values_of(where):
        return cls.from_peft(options)


def spec_for(config: Mapping[str, Any], where: str) -> MethodSpec:
    kind = config.get("peft_type")
    known = sorted({s.peft_type for s in catalog().values() if s.peft_type})
    if not isinstance(kind, str) or kind not in known:
        hint = did_you_mean(str(kind), known)
        raise CheckpointError(
            f"{where} has peft_type {kind!r}, which this version of inlay cannot read; it reads "
            f"{', '.join(known)}.{hint}"
        )
    fitting = [s for s in catalog().values() if s.peft_type == kind]
    return max(fitting, key=lambda s: agreement(s, config))


def agreement(spec: MethodSpec, config: Mapping[str, Any]) -> int:
    """Count a method's fixed options that a configuration sets so; -1 when one differs."""
    cls = spec.load()
    same = [config.get(key) == value for key, value in cls.peft_fixed.items()]
    return sum(same) if all(same) else -1


def refuse_unknown(
    options: Mapping[str, Any], ours: set[str], where: str, remedy: str | None
) -> None:
    plain = f"convert the adapter to plain {options['peft_type']} in HF PEFT first"
    neutral = DEFAULTS.get(options["peft_type"], {})
    for key, value in options.items():
        if key in ours or key in PLACEMENT or key in WITHOUT_EFFECT:
            continue
        if key == "init_lora_weights" and value in INITS:
            continue
        if value not in (None, False, neutral.get(key)) and value not in ([], {}):
            raise CheckpointError(
                f"{where} sets {key} to {shortened(value)}, which this version of inlay does not "
                f"have; {remedy or plain}"
            )
    newer = [key for key in options if key not in {*ours, *PLACEMENT, *WITHOUT_EFFECT, *neutral}]
    if newer and remedy is None:
        warnings.warn(
            f"{where} has options that this version of inlay does not know ({', '.join(newer)}); "
            "they are off and were left out",
            stacklevel=6,
        )


def checked(spec: MethodSpec, mine: str, theirs: str, value: Any, where: str) -> Any:
    try:
        adapter = TypeAdapter(spec.fields[mine].type)
        typed = adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        annotation = spec.fields[mine].annotation
        raise CheckpointError(
            f"{where}: {theirs} must be {annotation}, not {shortened(value)} "
            f"({error.errors()[0]['msg']})"
        ) from None
    return tuple(typed) if isinstance(value, list) else value


def patterns(config: Mapping[str, Any], key: str, where: str) -> str | list[str]:
    """HF PEFT takes an entry of such a list for any ending of a name, within a component too."""
    found = words(config, key, where)
    return found if isinstance(found, str) else [f".*{re.escape(word)}" for word in found]


def words(config: Mapping[str, Any], key: str, where: str) -> str | list[str]:
    """Return an option that is a string (a pattern), a list of strings, or absent (empty)."""
    value = config.get(key)
    if value is None:
        return []
    if isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(v, str) for v in value)
    ):
        return value
    raise CheckpointError(f"{where}: {key} must be a string or a list of strings, not {value!r}")


@contextmanager
def values_of(where: str) -> Generator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except AdapterError as error:
        raise CheckpointError(f"{where}: {error}") from None


def recorded_method(extras: Mapping[str, Any], where: str) -> Method:
    name, given = extras.get("method"), extras.get("hyperparameters")
    if not isinstance(name, str) or not isinstance(given, dict):
        raise CheckpointError(f"{where} must name a method and its hyperparameters; it is damaged")
    with values_of(where):
        spec = find_method(name)
        known = [key for key in given if key in spec.fields]
        typed = {key: checked(spec, key, key, given[key], where) for key in known}
        return build_method(name, {**given, **typed})


def shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
