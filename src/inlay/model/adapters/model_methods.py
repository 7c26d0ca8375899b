"""What others call on a model that carries adapters: save it, load into it, choose an adapter.

transformers would save the base alone, under the tuned model's name, and read it back as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, overload

from torch import nn
from transformers import PreTrainedModel

from inlay.model.adapters.wrapped import unwrapped
from inlay.model.seams.transformers import follow_trainer

FILES = "inlay.checkpoint.attached"
"""Where files are written and read: called from here, and not known."""
CALLS = ("save_pretrained", "load_adapter", "set_adapter")
ACTIVE = "active_adapters"


def answer_for(model: nn.Module) -> None:
    """Have the model's own calls of files and adapters mean Inlay's."""
    if not isinstance(model, PreTrainedModel):
        return
    for name in CALLS:
        vars(model)[name] = partial(call, name, model)
    vars(model)[ACTIVE] = ActiveAdapters(model)
    follow_trainer(restore)


def stop_answering(model: nn.Module) -> None:
    """Give the model its class's calls back."""
    for name in (*CALLS, ACTIVE):
        vars(model).pop(name, None)


def call(name: str, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a function of the room that knows files."""
    return getattr(import_module(FILES), name)(model, *args, **kwargs)


def restore(model: nn.Module, checkpoint: Path) -> bool:
    """Put a checkpoint's adapters into a model; False where model or checkpoint has none."""
    inner = unwrapped(model)
    return "inlay" in vars(inner) and call("restore", inner, checkpoint)


class ActiveAdapters(Sequence[str]):
    """The names of the active adapters: a list, as PEFT has it, and a call, as transformers has."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> list[str]:
        registry: Any = vars(self.model).get("inlay")
        return list(registry.active) if registry else []

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self()[index]

    def __len__(self) -> int:
        return len(self())

    def __iter__(self) -> Iterator[str]:
        return iter(self())

    def __repr__(self) -> str:
        return repr(self())
