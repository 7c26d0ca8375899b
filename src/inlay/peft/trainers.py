"""What makes a trainer that is given a `peft_config` call Inlay."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import peft

from inlay.peft.model import get_peft_model

NAME = "get_peft_model"
LIBRARIES = ("peft", "trl")
"""Whose modules call HF PEFT's function by a name of their own."""


def take_over() -> ExitStack:
    """Let `peft_config=` given to a TRL trainer make an Inlay model, from this line on.

    HF PEFT's `get_peft_model` is replaced by Inlay's in `peft` and in TRL's modules, those that are
    loaded later too; a name that a script itself imported before stays what it was. Where the
    result is used in `with`, or closed, the name is given back.

    >>> import peft
    >>> from inlay.peft import get_peft_model, take_over
    >>> with take_over():
    ...     peft.get_peft_model is get_peft_model
    True
    >>> peft.get_peft_model is get_peft_model
    False
    """
    theirs = peft.get_peft_model
    put(get_peft_model, in_place_of=theirs)
    undo = ExitStack()
    undo.callback(put, theirs, in_place_of=get_peft_model)
    return undo


def put(function: object, in_place_of: object) -> None:
    """Give the name to another function, in every loaded module where it has that one."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in LIBRARIES and vars(module).get(NAME) is in_place_of:
            setattr(module, NAME, function)
