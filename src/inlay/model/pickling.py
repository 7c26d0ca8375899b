"""Modules whose class was changed in place, pickled by how their class is made, not its name."""

from __future__ import annotations

from typing import Any

from torch import nn

MADE_BY = "made_by"
"""In such a class: the function that made it and its arguments, the class below it first."""


def reduced(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """`__reduce_ex__` of such a class: how pickle and copy rebuild the module."""
    _, _, *state = object.__reduce_ex__(module, protocol)  # pyright: ignore[reportGeneralTypeIssues]
    return (empty, (recipe(type(module)),), *state)


def recipe(cls: type[nn.Module]) -> Any:
    """Return how to rebuild a class: itself where its name finds it, else its maker."""
    made_by = vars(cls).get(MADE_BY)
    if made_by is None:
        return cls
    make, below, *rest = made_by
    return make, recipe(below), *rest


def made(how: Any) -> type[nn.Module]:
    if not isinstance(how, tuple):
        return how
    make, below, *rest = how
    return make(made(below), *rest)


def empty(how: Any) -> nn.Module:
    cls = made(how)
    return cls.__new__(cls)
