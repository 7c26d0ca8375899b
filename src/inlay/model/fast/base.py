"""Modules that change their class in place, to compute the same result faster."""

from __future__ import annotations

import functools
import inspect
from functools import cache
from typing import Any, ClassVar

from torch import nn

from inlay.model.adapters.change_class import change_class
from inlay.model.pickling import MADE_BY, reduced


class Fast(nn.Module):
    """Base of the fast paths: computes what the module's own class computes."""

    plain: ClassVar[type[nn.Module]]
    proven: frozenset[str] = frozenset()
    """The cases in which it was proven equal (`inlay.model.fast.proof`)."""


def become_fast(module: nn.Module, fast: type[Fast], proven: frozenset[str]) -> None:
    change_class(module, class_in_place(type(module), fast))
    module.__dict__["proven"] = proven


def become_plain(module: Fast) -> None:
    change_class(module, type(module).plain)
    module.__dict__.pop("proven", None)


@cache
def parameters_of(plain: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of a class's forward parameters that may be given by position."""
    return tuple(inspect.signature(plain.forward).parameters)[1:]


def by_name(
    plain: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    return dict(zip(parameters_of(plain), args, strict=False)) | kwargs


@cache
def class_in_place(plain: type[nn.Module], top: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `plain` whose forward is `top`'s, with the name, signature and doc."""
    body: dict[str, Any] = {
        "plain": plain,
        "original": plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": reduced,
        MADE_BY: (class_in_place, plain, top),
        # In the body, so that transformers wraps a block's forward for checkpointing.
        "forward": with_signature(top.forward, plain),
    }
    return type(plain.__name__, (top, plain), body)


def with_signature(forward: Any, plain: type[nn.Module]) -> Any:
    """Return a forward with the signature of the plain one, which Trainer and PEFT read."""

    @functools.wraps(plain.forward)
    def fast_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return fast_forward
