"""Adapters on disk for a `PeftModel`: found in a folder or on the hub, read strictly, written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, snapshot_download
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from inlay.checkpoint.adapter import check_recorded, load_adapter, read_adapter, save_adapter
from inlay.checkpoint.folder import CARD, CONFIG, EXTRAS, TENSORS, located, read_json
from inlay.checkpoint.placement import described
from inlay.checkpoint.tensors import fill, slots
from inlay.errors import CheckpointError
from inlay.model.attach import adapters
from inlay.peft.configs import recorded_of
from inlay.peft.errors import AdapterError

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Options of HF PEFT's loading that say where on the hub an adapter is.

`device_map` and `torch_device` are taken too: an adapter lies where its layers do."""


OURS = "\n- inlay\n"
"""What every card that Inlay writes has in it."""


def folder_of(model_id: str | Path, options: Mapping[str, Any]) -> Path:
    """Return the folder of an adapter, fetched from the hub when it is not one on this disk.

    Raises:
        AdapterError: an option that Inlay does not have.
    """
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
    wanted = [inside + name for name in (CONFIG, TENSORS, EXTRAS)]
    hub = {key: options[key] for key in HUB if options.get(key) is not None}
    return Path(snapshot_download(str(model_id), allow_patterns=wanted, **hub)) / sub


def config_in(folder: Path) -> PeftConfig:
    """Return the configuration of an adapter's folder as HF PEFT's object.

    Raises:
        CheckpointError: the folder holds none, or one of a method that HF PEFT does not have.
    """
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


def read_new(model: nn.Module, name: str, folder: Path) -> None:
    """Attach an adapter from its folder."""
    load_adapter(model, folder, name)


def read_again(model: nn.Module, name: str, folder: Path) -> None:
    """Put a folder's values into an adapter that is there.

    Raises:
        CheckpointError: the folder's adapter is another one, or made for another base.
    """
    file, attached = read_adapter(folder), adapters(model)[name]
    if file.method.to_peft() != attached.method.to_peft():
        raise CheckpointError(
            f"the adapter in {folder} is {file.method}, and adapter {name!r} on this model is "
            f"{attached.method}; load it under another name"
        )
    about = f"the adapter in {folder} does not fit adapter {name!r} of this {described(model)}"
    fill(model, slots(model, name), located(folder, TENSORS), file.folder.tensors, about)
    if file.folder.extras is not None:
        check_recorded(model, attached, file.folder)


def write(model: nn.Module, name: str, directory: Path, config: PeftConfig) -> None:
    """Save one adapter as HF PEFT reads it; a card that a user wrote there stays."""
    readme = directory / CARD
    earlier = readme.read_text(encoding="utf-8") if readme.is_file() else OURS
    save_adapter(model, directory, name, recorded=recorded_of(config, model))
    if OURS not in earlier:
        kept = ModelCard(earlier, ignore_metadata_errors=True)
        setattr(kept.data, "library_name", "peft")  # noqa: B010
        readme.write_text(str(kept), encoding="utf-8")
