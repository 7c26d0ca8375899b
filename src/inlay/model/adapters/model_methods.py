"""The methods of a model that mean something else while adapters are on it.

Tying, resizing and replacing embeddings must not touch adapters: transformers ties weights by name
when it loads, saves or resizes, and would take an adapter's trained copy for the base's. Saving and
loading mean the adapter's files: transformers would save the base alone, under the tuned model's
name, and read it back as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from inlay.errors import AdapterError
from inlay.model.adapters import adapter_files
from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.adapters.registry import Registry, layers_inactive, override
from inlay.model.adapters.wrappers import unwrapped
from inlay.model.merge.untie import own_names
from inlay.model.trunk import InputGradients

TIES = "tie_weights"
EMBEDDINGS = {
    "resize_token_embeddings": ("get_input_embeddings", "get_output_embeddings"),
    "set_input_embeddings": ("get_input_embeddings",),
    "set_output_embeddings": ("get_output_embeddings",),
}
"""The methods that put other embeddings in place -> what gets the present ones."""


def override_methods(model: nn.Module, registry: Registry) -> None:
    for _, module in list(own_modules(model)):
        for name in (TIES, *EMBEDDINGS):
            if callable(getattr(type(module), name, None)) and name not in vars(module):
                replacement = TieBase if name == TIES else KeepEmbeddings
                override(registry, module, name, replacement(module, name))
    if hasattr(model, "enable_input_require_grads"):
        override(registry, model, "enable_input_require_grads", InputGradients(model))
    if isinstance(model, PreTrainedModel):
        for name, function in FILE_METHODS.items():
            override(registry, model, name, partial(function, model))
        override(registry, model, "active_adapters", ActiveAdapters(model))


class Replacement:
    """Stands in for a method of a model's class."""

    def __init__(self, owner: nn.Module, method: str) -> None:
        self.owner, self.method = owner, method

    def own(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)


class TieBase(Replacement):
    """`tie_weights`: ties the base's weights; adapters' own copies stay what they are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with layers_inactive(self.owner), own_names(self.owner):
            return self.own(*args, **kwargs)


class KeepEmbeddings(Replacement):
    """Methods that replace an embedding: refused where an adapter is on the present one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for getter in EMBEDDINGS[self.method]:
            layer = getattr(self.owner, getter)() if hasattr(self.owner, getter) else None
            if not isinstance(layer, AdaptedLayer) or not len(layer.adapters):
                continue
            if not self.leaves(layer, *args, **kwargs):
                name = next((n for n, m in own_modules(self.owner) if m is layer), getter)
                raise AdapterError(
                    f"{self.method} would put other weights at {name}, where adapter "
                    f"{next(iter(layer.adapters))!r} is, which was made for the present ones; call "
                    f"inlay.detach or inlay.merge, then {self.method}, then attach"
                )
        return self.own(*args, **kwargs)

    def leaves(self, layer: nn.Module, *args: Any, **kwargs: Any) -> bool:
        given = [value for value in (*args[:1], *kwargs.values()) if value is not None]
        size = getattr(layer, "num_embeddings", getattr(layer, "out_features", None))
        return all(value is layer or (isinstance(value, int) and value == size) for value in given)


def save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    adapter_files.provider().save_pretrained(model, *args, **kwargs)


def load_adapter(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    adapter_files.provider().load_adapter(model, *args, **kwargs)


def set_adapter(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    adapter_files.provider().set_adapter(model, *args, **kwargs)


def restore(model: nn.Module, checkpoint: Path) -> bool:
    """Put a checkpoint's adapters into a model; False where model or checkpoint has none."""
    inner = unwrapped(model)
    return "inlay" in vars(inner) and adapter_files.provider().restore(inner, checkpoint)


FILE_METHODS = {
    "save_pretrained": save_pretrained,
    "load_adapter": load_adapter,
    "set_adapter": set_adapter,
}


class ActiveAdapters(Sequence[str]):
    """The names of the active adapters: a list, as PEFT has it, and a call, as transformers has."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> list[str]:
        registry: Any = vars(self.model).get("inlay")
        return list(registry.active) if registry else []

    def __getitem__(self, index: Any) -> Any:
        return self()[index]

    def __len__(self) -> int:
        return len(self())

    def __repr__(self) -> str:
        return repr(self())
