"""Keys of other models and libraries, converted to the names that this model has.

Keys of a compiled or wrapped model, of a whole state saved by torch.save, of the bare body or of
the whole model, and those that transformers has renamed since.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from inlay.checkpoint.embeddings import PREFIX
from inlay.checkpoint.folder import AdapterFolder
from inlay.methods.base import Kind, Method, PromptMethod
from inlay.model.adapters.layer import own_modules
from inlay.model.seams.transformers import renaming

WRAPPERS = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
LEADING = re.compile(rf"^(?:module\.)?(?:{re.escape(PREFIX)}|base_model\.)*(?:module\.)?")
NAMED = re.compile(
    r"\.(lora_[AB](?=\.[^.]+\.(?:weight|bias)$)"
    r"|lora_(?:embedding_A|embedding_B|magnitude_vector)|ia3_l|modules_to_save)"
    r"\.(?!weight$|bias$)([^.]+)(?=\.|$)"
)
"""A tensor of HF PEFT's modules in memory, whose key has the adapter's name."""
Rename = Callable[[str], str]


def fitted(model: nn.Module, method: Method, folder: AdapterFolder) -> AdapterFolder:
    """Return the folder with this model's keys; keys that no conversion fits stay."""
    if isinstance(method, PromptMethod) or not folder.tensors:
        return folder
    places = Places(model, method)
    keys = {key: key for key in folder.tensors}
    if places.have(keys.values()):
        return folder
    plain = {key: plainly(key) for key in keys}
    renames = [lambda name: name, *other_names(model)]
    for rename in renames:
        found = {key: PREFIX + rename(name) for key, name in plain.items()}
        if len(set(found.values())) == len(found) and places.have(found.values()):
            return converted(folder, found, method)
    return folder


def plainly(key: str) -> str:
    """Return a key without what wrappers and HF PEFT's modules in memory put into it.

    >>> plainly("base_model.model._orig_mod.layers.0.q_proj.lora_A.default.weight")
    'layers.0.q_proj.lora_A.weight'
    """
    key = LEADING.sub("", WRAPPERS.sub("", key), count=1)
    key = NAMED.sub(lambda found: f".{found[1]}", key)
    return key.replace(".modules_to_save.", ".")


def other_names(model: nn.Module) -> Iterator[Rename]:
    """Yield functions to other names: transformers' renames, the body inside or outside a model."""
    theirs = renaming(model)
    body = getattr(model, "base_model_prefix", "")
    if theirs is not None:
        yield theirs
    if body:
        yield lambda name: f"{body}.{name}"
        yield lambda name: name.removeprefix(f"{body}.")
    if theirs is not None and body:
        yield lambda name: theirs(f"{body}.{name}")
        yield lambda name: theirs(name).removeprefix(f"{body}.")


def endings_of(method: Method) -> set[str]:
    kinds: tuple[Kind, ...] = ("linear", "conv1d", "embedding")
    return {key for kind in kinds for key in method.peft_tensors(kind).values()}


def method_modules(method: Method, keys: Iterable[str]) -> list[str]:
    endings = {f".{ending}" for ending in endings_of(method)}
    names = [key.removeprefix(PREFIX) for key in keys]
    found = {name.removesuffix(e): None for name in names for e in endings if name.endswith(e)}
    return list(found)


class Places:
    """The keys that a model and a method can have."""

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.modules = dict(own_modules(model))
        self.endings = endings_of(method)

    def have(self, keys: Collection[str]) -> bool:
        return all(key.startswith(PREFIX) and self.has(key.removeprefix(PREFIX)) for key in keys)

    def has(self, name: str) -> bool:
        """Return whether a name is that of a module, then of a tensor that the module can have."""
        for cut in [i for i, letter in enumerate(name) if letter == "."][::-1]:
            module = self.modules.get(name[:cut])
            if module is None:
                continue
            rest = re.sub(r"^(base_layer\.)+", "", name[cut + 1 :])
            own = {*module._parameters, *module._buffers, *vars(module)}
            return rest in self.endings or rest in own or "." not in rest
        return False


def converted(folder: AdapterFolder, keys: Mapping[str, str], method: Method) -> AdapterFolder:
    old = next((key for key, new in keys.items() if key != new), None)
    if old is None:
        return folder
    warnings.warn(
        f"the adapter in {folder.path} was converted to this model's names ({old} is read as "
        f"{keys[old]}); inlay.save_adapter writes it so",
        stacklevel=6,
    )
    config: dict[str, Any] = dict(folder.config)
    if config.get("target_modules") is not None:
        config["target_modules"] = method_modules(method, keys.values())
        config |= {key: None for key in ("exclude_modules", "layers_to_transform", "layers_pattern")
                   if key in config}  # fmt: skip
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(key), dict):
            config[key] = {WRAPPERS.sub("", name): v for name, v in config[key].items()}
    if isinstance(config.get("modules_to_save"), list):
        config["modules_to_save"] = [
            WRAPPERS.sub("", name) if isinstance(name, str) else name
            for name in config["modules_to_save"]
        ]
    return dataclasses.replace(
        folder,
        config=config,
        extras=None,
        tensors={new: folder.tensors[key] for key, new in keys.items()},
        renamed={new: key for key, new in keys.items()},
    )
