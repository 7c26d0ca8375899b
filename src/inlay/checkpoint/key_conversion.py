"""Adapters as people have them, brought into the names that this model has.

Keys of a compiled or wrapped model, of a whole state saved by torch.save, of the bare body or of
the whole model, and those that transformers has renamed since.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from inlay.checkpoint.folder import AdapterFolder
from inlay.methods.base import Kind, Method, PromptMethod
from inlay.model.adapters.layer import own_modules
from inlay.model.seams.transformers import renaming

PREFIX = "base_model.model."


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
    """Return a folder whose keys and targets are this model's; the same one where they are.

    A note says what was converted. Keys that no conversion brings to places of this model stay.
    """
    if isinstance(method, PromptMethod) or not folder.tensors:
        return folder
    places = Places(model, method)
    keys = {key: key for key in folder.tensors}
    if places.have(keys.values()):
        return folder
    plain = {key: plainly(key) for key in keys}
    renames = [lambda name: name, *ways(model)]
    for rename in renames:
        found = {key: PREFIX + rename(name) for key, name in plain.items()}
        if len(set(found.values())) == len(found) and places.have(found.values()):
            return converted(folder, found, places)
    return folder


def plainly(key: str) -> str:
    """Return a key without what wrappers and HF PEFT's modules in memory put into it.

    >>> plainly("base_model.model._orig_mod.layers.0.q_proj.lora_A.default.weight")
    'layers.0.q_proj.lora_A.weight'
    """
    key = LEADING.sub("", WRAPPERS.sub("", key), count=1)
    key = NAMED.sub(lambda found: f".{found[1]}", key)
    return key.replace(".modules_to_save.", ".")


def ways(model: nn.Module) -> Iterator[Rename]:
    """Yield ways to other names: transformers' renames, and the body inside or outside a model."""
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


class Places:
    """What keys a model and a method have."""

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.modules = dict(own_modules(model))
        kinds: tuple[Kind, ...] = ("linear", "conv1d", "embedding")
        self.endings = {key for kind in kinds for key in method.peft_tensors(kind).values()}

    def have(self, keys: Collection[str]) -> bool:
        """Say whether every key names a place of the model."""
        return all(key.startswith(PREFIX) and self.has(key.removeprefix(PREFIX)) for key in keys)

    def has(self, name: str) -> bool:
        """Say whether a name is a module's and, after it, a tensor's that it can have here."""
        for cut in [i for i, letter in enumerate(name) if letter == "."][::-1]:
            module = self.modules.get(name[:cut])
            if module is None:
                continue
            rest = re.sub(r"^(base_layer\.)+", "", name[cut + 1 :])
            own = {*module._parameters, *module._buffers, *vars(module)}
            return rest in self.endings or rest in own or "." not in rest
        return False

    def targets(self, keys: Collection[str]) -> list[str]:
        """Return the modules that have tensors of the method among these keys."""
        found: dict[str, None] = {}
        for key in keys:
            for ending in self.endings:
                if key.endswith("." + ending):
                    found[key.removeprefix(PREFIX).removesuffix("." + ending)] = None
        return list(found)


def converted(folder: AdapterFolder, keys: Mapping[str, str], places: Places) -> AdapterFolder:
    """Return the folder with keys of other names, and its targets taken from them."""
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
        config["target_modules"] = places.targets(keys.values())
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
