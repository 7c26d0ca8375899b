"""`save_pretrained`, `load_adapter` and `set_adapter` of a transformers model with adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor, nn

from inlay.checkpoint.adapter import load_adapter as load_new
from inlay.checkpoint.adapter import reload_adapter, save_adapter
from inlay.checkpoint.fingerprint import base_name
from inlay.checkpoint.folder import CONFIG, located
from inlay.errors import AdapterError, CheckpointError
from inlay.model.adapters.attach import use
from inlay.model.adapters.registry import active, adapters

DEFAULT = "default"
WITHOUT_EFFECT = frozenset({
    "max_shard_size", "variant", "save_peft_format", "save_original_format", "safe_serialization",
    "save_function", "tags", "selected_adapters", "save_embedding_layers",
})  # fmt: skip
"""Options of other libraries' saving that have no effect on an adapter's one file."""
HUB = ("commit_message", "private", "create_pr", "revision")
SAVED = (
    "save_pretrained of a model with adapters writes the adapter alone, as HF PEFT does "
    "(adapter_config.json, adapter_model.safetensors); for a whole model call "
    "inlay.merge(model, output=...)"
)
UNNAMED = (
    ". The base was built from a configuration, so it has no name that from_pretrained could find "
    "it under: inlay.load_adapter puts the adapter on it"
)


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    **kwargs: Any,
) -> None:
    """Save the model's adapters: the only one in the folder, of several `default` alone.

    The others have a subfolder of their name, as HF PEFT lays them out.

    Args:
        model: a model with adapters.
        save_directory: the folder.
        is_main_process: False writes nothing.
        state_dict: values to write in place of the model's own, as accelerate has gathered them.
        push_to_hub: upload the folder too.
        token: of the hub.
        **kwargs: options of transformers' `save_pretrained`; `repo_id` and others of the hub.

    Raises:
        AdapterError: an option that Inlay does not have.
        CheckpointError: the disk is full, or an adapter holds values that are not finite.
    """
    hub = {key: kwargs.pop(key) for key in ("repo_id", *HUB) if key in kwargs}
    for key, value in kwargs.items():
        if key not in WITHOUT_EFFECT and value not in (None, False):
            raise AdapterError(
                f"save_pretrained was given {key}={value!r}, which an adapter's folder does not "
                "have; leave it out, or call inlay.merge and save the plain model"
            )
    if not is_main_process:
        return
    folder = Path(save_directory)
    for name in adapters(model):
        save_adapter(model, home_of(model, name, folder), name, state=state_dict)
    warnings.warn(SAVED if base_name(model) else SAVED + UNNAMED, stacklevel=4)
    if push_to_hub:
        api = HfApi(token=token)
        repo = hub.pop("repo_id", None) or folder.name
        repo = api.create_repo(repo, exist_ok=True, private=hub.pop("private", None)).repo_id
        api.upload_folder(repo_id=repo, folder_path=folder, **hub)


def home_of(model: nn.Module, name: str, folder: Path) -> Path:
    return folder if name == DEFAULT or len(adapters(model)) == 1 else folder / name


def load_adapter(
    model: nn.Module, model_id: str | Path, adapter_name: str | None = None, **kwargs: Any
) -> None:
    """Load an adapter from its folder: a new one, or other values for the one of this name."""
    for key, value in kwargs.items():
        if key not in ("is_trainable", "low_cpu_mem_usage", "hotswap") and value is not None:
            raise AdapterError(
                f"load_adapter was given {key}, which inlay does not have; call "
                "inlay.load_adapter(model, folder, name)"
            )
    name = adapter_name or DEFAULT
    if name in adapters(model):
        reload_adapter(model, model_id, name)
    else:
        load_new(model, model_id, name)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    use(model, *([adapter_name] if isinstance(adapter_name, str) else adapter_name))


def restore(model: nn.Module, checkpoint: Path) -> bool:
    """Load a Trainer's checkpoint into the adapters; False where it holds no adapter's files."""
    homes = {name: home_of(model, name, checkpoint) for name in adapters(model)}
    there = {name: at for name, at in homes.items() if located(at, CONFIG).is_file()}
    if not there:
        return False
    lacking = [name for name in active(model) if name not in there]
    if lacking:
        raise CheckpointError(
            f"{checkpoint} holds no adapter {lacking[0]!r}, which is active on this model; it "
            f"holds {', '.join(there)}"
        )
    for name, at in there.items():
        reload_adapter(model, at, name)
    return True
