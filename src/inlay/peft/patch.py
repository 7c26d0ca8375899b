"""Puts Inlay's functions in the place of HF PEFT's, in `peft` and in TRL."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import peft

from inlay.peft.model import get_peft_model
from inlay.peft.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from inlay.peft.task_models import CLASSES

LIBRARIES = ("peft", "trl")
"""The libraries whose modules hold HF PEFT's functions under names of their own."""
OURS: dict[str, Any] = {
    "get_peft_model": get_peft_model,
    "get_peft_model_state_dict": get_peft_model_state_dict,
    "set_peft_model_state_dict": set_peft_model_state_dict,
}
TARGET = "_target_peft_class"
"""The attribute of HF PEFT's loaders that says which class the adapter is loaded with."""


def take_over() -> ExitStack:
    """Let `peft_config=` given to a TRL trainer make an Inlay model, from this line on.

    HF PEFT's `get_peft_model`, and the functions that read and set an adapter's state, are replaced
    by Inlay's in `peft` and in TRL's modules, those that are loaded later too; `AutoPeftModel…`
    gives Inlay's models. A name that a script itself imported before stays what it was.

    Returns:
        What gives every replaced attribute back: use it in `with`, or call its `close`.

    >>> import peft
    >>> from inlay.peft import get_peft_model, take_over
    >>> with take_over():
    ...     peft.get_peft_model is get_peft_model
    True
    >>> peft.get_peft_model is get_peft_model
    False
    """
    undo = ExitStack()
    for name, ours in OURS.items():
        theirs = getattr(peft, name)
        replace(name, theirs, ours)
        undo.callback(replace, name, ours, theirs)
    for ours in CLASSES:
        theirs: Any = getattr(peft, ours.__name__)
        undo.callback(setattr, theirs, TARGET, getattr(theirs, TARGET))
        setattr(theirs, TARGET, getattr(ours, TARGET))
    return undo


def replace(name: str, old: object, new: object) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in LIBRARIES and vars(module).get(name) is old:
            setattr(module, name, new)
