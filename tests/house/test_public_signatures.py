"""The public names of `inlay` and `inlay.peft` have the signatures of public_signatures.txt.

A parameter that goes, moves or changes its default breaks somebody's script. Where that is meant:

    python tests/house/test_public_signatures.py    # rewrites public_signatures.txt; commit it
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import inlay

peft = pytest.importorskip("peft")

import inlay.peft  # noqa: E402

FROZEN = Path(__file__).with_name("public_signatures.txt")
MODULES = ("inlay", "inlay.peft")


def public_signatures() -> str:
    """Return the signature of every public name, and of what `inlay.peft`'s classes promise."""
    lines = [
        signature(f"{module}.{name}", getattr(importlib.import_module(module), name))
        for module in MODULES
        for name in importlib.import_module(module).__all__
    ]
    lines += members(inlay.peft.PeftModel, peft.PeftModel)
    lines += members(inlay.peft.Tuner, peft.tuners.lora.LoraModel)
    return "\n".join(lines) + "\n"


def signature(name: str, value: Any) -> str:
    if not inspect.isclass(value):
        return f"{name}{text(value)}"
    if issubclass(value, Exception):
        return f"{name}: {', '.join(base.__name__ for base in value.__bases__)}"
    return f"class {name}{text(value)}"


def members(cls: type[Any], same: type[Any]) -> Iterator[str]:
    """Yield the public members of a class that HF PEFT's class has too, inherited ones included."""
    own = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "inlay"]
    found = {key: vars(base)[key] for base in reversed(own) for key in vars(base)}
    for key in sorted(key for key in found if key[0] != "_" and hasattr(same, key)):
        function = getattr(found[key], "__func__", found[key])
        is_function = isinstance(function, FunctionType)
        shown = text(function) if is_function else f": {type(found[key]).__name__}"
        yield f"inlay.peft.{cls.__name__}.{key}{shown}"


def text(value: Any) -> str:
    """Return a signature without the quotes around annotations."""
    return str(inspect.signature(value)).replace("'", "")


def test_the_public_signatures_are_the_frozen_ones() -> None:
    assert public_signatures() == FROZEN.read_text(), (
        "public signatures have changed; where that is meant, run "
        "`python tests/house/test_public_signatures.py` and say it in CHANGELOG.md"
    )


if __name__ == "__main__":
    FROZEN.write_text(public_signatures())
