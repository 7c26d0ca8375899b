"""Change a module's class in place, and the bound forwards of the class that the instance keeps.

`module.forward = wrapper` shadows the class's forward. Such a wrapper keeps the bound forward that
was there before it: as accelerate's hooks do, as a partial, or in a closure. When the module's
class changes, the kept forward must become the new class's, or the change would have no effect.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from inlay.model.seams.accelerate import KEPT_FORWARDS

DEPTH = 6
"""Wrappers inside wrappers in which a kept forward is looked for."""


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    leaving = type(module)
    object.__setattr__(module, "__class__", cls)
    if "forward" not in vars(module):
        return
    for kept, put in kept_forwards(module):
        if kept.__func__ in forwards_of(leaving):
            put(types.MethodType(cls.forward, module))


def is_shadowed(module: nn.Module) -> bool:
    """Return whether an instance has its own forward, which does not call the class's."""
    if "forward" not in vars(module):
        return False
    own = forwards_of(type(module))
    return not any(kept.__func__ in own for kept, _ in kept_forwards(module))


def forwards_of(cls: type[nn.Module]) -> set[Any]:
    return {vars(c)["forward"] for c in cls.__mro__ if "forward" in vars(c)}


Setter = Callable[[types.MethodType], None]


def kept_forwards(module: nn.Module) -> Iterator[tuple[types.MethodType, Setter]]:
    """Yield every bound forward of the module that its instance keeps, and a setter for it."""
    for name in ("forward", *KEPT_FORWARDS):
        if name in vars(module):
            put = partial(vars(module).__setitem__, name)
            yield from forwards_in(vars(module)[name], put, module, DEPTH)


def forwards_in(
    held: Any, put: Callable[[Any], None], module: nn.Module, depth: int
) -> Iterator[tuple[types.MethodType, Setter]]:
    if not depth or not callable(held):
        return
    if isinstance(held, types.MethodType):
        if held.__self__ is module and getattr(held, "__name__", "") == "forward":
            yield held, put
        elif isinstance(held.__func__, types.FunctionType):
            yield from forwards_in_function(held.__func__, module, depth - 1)
    elif isinstance(held, partial):
        again = partial(with_function, held, put)
        yield from forwards_in(held.func, again, module, depth - 1)
    elif isinstance(held, types.FunctionType):
        yield from forwards_in_function(held, module, depth - 1)


def forwards_in_function(
    function: types.FunctionType, module: nn.Module, depth: int
) -> Iterator[tuple[types.MethodType, Setter]]:
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        yield from forwards_in(content, partial(setattr, cell, "cell_contents"), module, depth)
    for place, default in enumerate(function.__defaults__ or ()):
        yield from forwards_in(default, partial(set_default, function, place), module, depth)


def with_function(held: partial[Any], put: Setter, function: Any) -> None:
    made = partial(function, *held.args, **held.keywords)
    made.__dict__.update(held.__dict__)
    put(made)  # pyright: ignore[reportArgumentType]


def set_default(function: types.FunctionType, place: int, value: Any) -> None:
    defaults = list(function.__defaults__ or ())
    defaults[place] = value
    function.__defaults__ = tuple(defaults)
