"""An adapter's folder for a `PeftModel`: found on disk or on the hub, and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, snapshot_download
from peft import PeftConfig, PeftModelForCausalLM, PeftType
from torch import Tensor, nn

from inlay.checkpoint.adapter import save_adapter
from inlay.checkpoint.adapter_file import read_adapter
from inlay.checkpoint.folder import CARD, CONFIG, EXTRAS, TENSORS, located, read_json
from inlay.checkpoint.slots import slots
from inlay.errors import CheckpointError
from inlay.files import write_text
from inlay.methods.params import Params
from inlay.model.adapters.registry import adapters
from inlay.peft.configs import method_of, prepared, recorded_of
from inlay.peft.errors import AdapterError
from inlay.peft.seam import PEFT_TYPE_TO_CONFIG_MAPPING

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Options of HF PEFT's loading that say where on the hub an adapter is.

`device_map` and `torch_device` are taken too: an adapter lies where its layers do."""
OURS = "\n- inlay\n"
"""A line that every card of Inlay has."""


def folder_of(model_id: str | Path, options: Mapping[str, Any]) -> Path:
    """Return the folder of an adapter, fetched from the hub when it is not one on this disk."""
    known = {"subfolder", "device_map", "torch_device", *HUB}
    for key, value in options.items():
        if key not in known and value not in (None, False):
            raise AdapterError(
                f"loading an adapter was given {key}={value!r}, which inlay does not have; leave "
                f"it out (there are {', '.join(sorted(known))})"
            )
    sub = options.get("subfolder") or ""
    if Path(model_id).exists():
        return Path(model_id) / sub
    inside = f"{sub}/" if sub else ""
    patterns = [inside + name for name in (CONFIG, TENSORS, EXTRAS)]
    hub = {key: options[key] for key in HUB if options.get(key) is not None}
    return Path(snapshot_download(str(model_id), allow_patterns=patterns, **hub)) / sub


def config_in(folder: Path) -> PeftConfig:
    read_adapter(folder)
    where = located(folder, CONFIG)
    kind = read_json(where).get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CheckpointError(
            f"{where} has peft_type {kind!r}, a method that HF PEFT does not have; load it with "
            "inlay.load_adapter"
        )
    found: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)].from_pretrained(str(where.parent))
    return found


def check_means(model: nn.Module, name: str, config: PeftConfig) -> None:
    given, found = method_of(prepared(config, model)), adapters(model)[name].method
    if given.to_peft() != found.to_peft():
        raise CheckpointError(
            f"the configuration given is {given}, and the folder's adapter is {found}; leave "
            "config out"
        )


def write(
    wrapped: Any,
    name: str,
    directory: Path,
    tags: str | Sequence[str] | None,
    embeddings: bool | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save one adapter as HF PEFT reads it; a card that a user wrote there stays."""
    readme, model = directory / CARD, wrapped.get_base_model()
    earlier = readme.read_text(encoding="utf-8") if readme.is_file() else OURS
    recorded = recorded_of(wrapped.peft_config[name], model)
    values = values_in_state(wrapped, name, state)
    save_adapter(model, directory, name, recorded=recorded, embeddings=embeddings, state=values)
    text = earlier if OURS not in earlier else readme.read_text(encoding="utf-8")
    card = ModelCard(text, ignore_metadata_errors=True)
    write_metadata(card, wrapped, [tags] if isinstance(tags, str) else list(tags or ()))
    write_text(readme, str(card))


def write_metadata(card: Any, wrapped: Any, more: list[str]) -> None:
    named: list[str] = list(getattr(wrapped.get_base_model(), "model_tags", None) or ())
    theirs: set[str] = wrapped._get_peft_specific_model_tags()
    here: list[str] = list(getattr(card.data, "tags", None) or ())
    card.data.library_name = "peft"
    card.data.tags = list(dict.fromkeys([*here, *sorted(theirs), *named, *more]))
    if isinstance(wrapped, PeftModelForCausalLM) and not getattr(card.data, "pipeline_tag", None):
        card.data.pipeline_tag = "text-generation"


def values_in_state(
    wrapped: Any, name: str, state: Mapping[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Return an adapter's values, by their base model names, from the wrapped model's state."""
    if state is None:
        return None
    base = wrapped.get_base_model()
    own = {id(value): key for key, value in wrapped.state_dict(keep_vars=True).items()}
    named = {id(value): key for key, value in wrapped.named_parameters()}
    homes = {id(m): place for place, m in base.named_modules() if isinstance(m, Params)}
    found: dict[str, Tensor] = {}
    for slot in slots(base, name):
        spelled = (own.get(id(slot.tensor)), named.get(id(slot.tensor)), slot.key)
        keys = [str(key) for key in spelled if key in state]
        if not keys:
            raise AdapterError(
                f"the state_dict given lacks {slot.key} of adapter {name!r}; give the model's own "
                "state_dict(), or leave it out to save the values as they are"
            )
        value, of_file = state[keys[0]], keys[0] == slot.key
        expected = slot.written.shape if of_file else slot.tensor.shape
        if value.shape != expected:
            raise AdapterError(
                f"the state_dict given has {keys[0]} of shape {list(value.shape)}, expected "
                f"{list(expected)}; gather a sharded state before it is saved"
            )
        found[f"{homes[id(slot.home)]}.{slot.name}"] = slot.layout.read(value) if of_file else value
    return found
