"""Wrappers of compiled, data-parallel and checkpointed models, which every verb looks through."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from inlay.errors import ModelError

P = ParamSpec("P")
T = TypeVar("T")

INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DeepSpeedEngine": "module",
}
"""Wrapper class -> the name of the module inside. By name: most are costly to import."""
FLAT = "FullyShardedDataParallel"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers; `ModelError` where one has flattened the weights."""
    while (name := inside(type(model))) is not None:
        if name == FLAT:
            raise ModelError(
                "FullyShardedDataParallel (FSDP1) holds a model's weights as flat pieces, which "
                "cannot be looked into; call inlay before wrapping it, or divide it with FSDP2 "
                "(fully_shard, fsdp_version: 2 in accelerate), which leaves the weights in place"
            )
        inner: Any = model._modules[name]
        model = inner
    return model


@cache
def inside(cls: type[nn.Module]) -> str | None:
    """Return the name under which a wrapper class keeps the module; None for another class."""
    for each in cls.__mro__:
        if each.__module__.startswith(("torch.", "deepspeed.")):
            if each.__name__ == FLAT:
                return FLAT
            if each.__name__ in INSIDE:
                return INSIDE[each.__name__]
    return None


def looks_through(verb: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Have a verb act on the model inside its wrappers, and return the wrapper it was given."""

    @wraps(verb)
    def acting(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> T:
        inner = unwrapped(model)
        result: Any = verb(inner, *args, **kwargs)
        given: Any = model
        return given if result is inner else result

    return acting


def adds_tensors(verb: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """As `looks_through`, for a verb that adds tensors: refused inside DistributedDataParallel."""
    through = looks_through(verb)

    @wraps(verb)
    def adding(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> T:
        check_gains(model)
        return through(model, *args, **kwargs)

    return adding


def check_gains(model: nn.Module) -> None:
    """Raise when gradients of new tensors would not be averaged over the processes."""
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    if parallel and torch.distributed.get_world_size(model.process_group) > 1:
        raise ModelError(
            "DistributedDataParallel averages the gradients of the parameters that it was built "
            "with; attach or load the adapter first, then wrap the model"
        )
