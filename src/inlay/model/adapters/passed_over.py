"""What an adapter passes over: everything with weights that is no linear layer, and what it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.places import expert_stacks, loose_parameters
from inlay.storage.convolution import CONVOLUTIONS
from inlay.storage.own import own_class
from inlay.storage.registry import kind, matrix_kind

SUBCLASSED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding)


def passed_over(model: nn.Module, chosen: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every module or parameter that holds a matrix and is not among `chosen`, with its kind."""
    attention: set[str] = set()
    for name, module in own_modules(model):
        if isinstance(module, nn.MultiheadAttention):
            attention.add(name)
            if name not in chosen:
                yield name, "attention module"
            continue
        if name in chosen or name.rpartition(".")[0] in attention:
            continue
        if isinstance(module, ParametrizationList):
            continue
        what = described(module)
        if what is not None:
            yield name, what
            continue
        stacks = list(expert_stacks(name, module))
        yield from ((each, "3-D expert weights") for each in stacks if each not in chosen)
        for each in loose_parameters(name, module):
            shape = module._parameters[each.rpartition(".")[2]]
            if each not in chosen and each not in stacks and is_matrix(shape):
                yield each, f"parameter of a {own_class(module).__name__}"


def is_matrix(parameter: nn.Parameter | None) -> bool:
    """Say whether a parameter has two directions at least, and is no vector written as a matrix."""
    return parameter is not None and sum(size > 1 for size in parameter.shape) > 1


def described(module: nn.Module) -> str | None:
    """Return what a module with a matrix is; None when it holds none, or is a linear layer."""
    holds = isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS))
    if holds and is_parametrized(module, "weight"):
        return "weight that a parametrisation computes"
    if isinstance(module, CONVOLUTIONS):
        return "convolution"
    for base in SUBCLASSED:
        if isinstance(module, base) and own_class(module) is not base and kind(module) is None:
            name = own_class(module).__name__
            return f"subclass {name} of {base.__name__} whose forward is its own"
    found = matrix_kind(module)
    if found == "embedding" or isinstance(module, nn.Embedding):
        return "embedding"
    return None
