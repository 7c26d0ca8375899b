"""Where adapters can stand: layers that hold a matrix, and single parameters of other modules.

A place is named as the module is, or as the parameter: `layers.0.mlp.experts.gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from inlay.errors import AdapterError
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.wrappers import unwrapped
from inlay.storage.base import FrozenLinear
from inlay.storage.convolution import CONVOLUTIONS, is_convolution
from inlay.storage.own import gives_product, holds_floats, own_class
from inlay.storage.parameters import Parameter, is_expert_stack, projections
from inlay.storage.registry import frozen, kind, matrix_kind

BLOCKS = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe")
BEYOND = ("convolution", "attention", "parameter")
"""What holds a matrix besides the kinds of layers; every method on weights goes there too."""
FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("w2",),)}
"""Parameter of a mixture's experts -> the layers that it holds, by the names they had apart."""


class Matrix(NamedTuple):
    """One matrix, or stack of matrices, at a place."""

    name: str
    """The name of the module that holds it."""
    parameter: str | None
    """None where the layer is adapted as a whole."""
    view: FrozenLinear

    @property
    def place(self) -> str:
        return joined(self.name, self.parameter) if self.parameter else self.name


def joined(module_name: str, name: str) -> str:
    return f"{module_name}.{name}" if module_name else name


def matrices_at(model: nn.Module, name: str) -> list[Matrix]:
    """Return the matrices at a place; raise `AdapterError` when there is no such place."""
    module, parameter = module_at(model, name)
    if parameter is not None:
        owner = name.rpartition(".")[0]
        return [Matrix(owner, parameter, Parameter(module, parameter))]
    if isinstance(module, nn.MultiheadAttention):
        found = [Matrix(name, p, Parameter(module, p)) for p in projections(module)]
        return [*found, Matrix(joined(name, "out_proj"), None, frozen(module.out_proj))]
    return [Matrix(name, None, frozen(module))] if matrix_kind(module) else []


def module_at(model: nn.Module, place: str) -> tuple[nn.Module, str | None]:
    """Return the module at a place, and its parameter if it is one; else raise `AdapterError`."""
    if place == "":
        return model, None
    owner, _, leaf = place.rpartition(".")
    try:
        above = unwrapped(model.get_submodule(owner))
    except AttributeError:
        above = None
    if above is not None and isinstance(above._modules.get(leaf), nn.Module):
        return unwrapped(above.get_submodule(leaf)), None
    if above is not None and leaf in above._parameters:
        return above, leaf
    raise AdapterError(f"the {type(model).__name__} has no module or parameter {place!r}")


def view_at(model: nn.Module, place: str) -> FrozenLinear | None:
    module, parameter = module_at(model, place)
    if parameter is not None:
        return Parameter(module, parameter)
    return frozen(module) if matrix_kind(module) else None


def loose_parameters(name: str, module: nn.Module) -> Iterator[str]:
    """Yield the dotted names of a module's parameters that could be adapted by themselves.

    Those are matrices and stacks that no layer kind stands for, an attention's excepted.
    """
    if matrix_kind(module) is not None or isinstance(module, nn.MultiheadAttention):
        return
    for key, held in module._parameters.items():
        if held is not None and held.ndim in (2, 3) and holds_floats(module, key):
            yield joined(name, key)


def expert_stacks(name: str, module: nn.Module) -> Iterator[str]:
    words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    if "expert" not in words and not hasattr(module, "is_transposed"):
        return
    if matrix_kind(module) is not None:
        return
    for key in module._parameters:
        if is_expert_stack(module, key):
            yield joined(name, key)


@dataclass(frozen=True)
class Places:
    """Everything in a model that a method can go to, by name."""

    modules: dict[str, nn.Module]
    adaptable: list[str]
    """Layers, blocks and attention modules that the method adapts, in the model's order."""
    linear: list[str]
    """The linear layers among `adaptable`, those inside attention modules left out."""
    experts: list[str]
    loose: list[str]
    """Other parameters that hold a matrix, which only their own name means."""

    def all_adaptable(self) -> list[str]:
        return [*self.adaptable, *self.experts, *self.loose]

    def aliases(self) -> dict[str, str]:
        """Map the names that experts' layers had before they became one parameter to its name."""
        found: dict[str, str] = {}
        for name in self.experts:
            owner, _, leaf = name.rpartition(".")
            for group in FUSED.get(leaf, ()):
                found |= {f"{owner}.{old}": name for old in group}
        return found

    def everything(self) -> list[str]:
        return [*self.modules, *self.experts, *self.loose, *self.aliases()]


def places_in(model: nn.Module, kinds: Sequence[str]) -> Places:
    modules = dict(own_modules(model))
    labels = {n: label(n, m) for n, m in modules.items()}
    inside = {n for n in modules if labels.get(n.rpartition(".")[0]) == "attention"}
    adaptable = [n for n in modules if labels[n] in kinds]
    products = (n for n in adaptable if labels[n] in ("linear", "conv1d") and n not in inside)
    linear = [n for n in products if is_a_product(modules[n])]
    single = modules.items() if "parameter" in kinds else ()
    experts = [e for n, m in single for e in expert_stacks(n, m)]
    known = set(experts)
    loose = [p for n, m in single for p in loose_parameters(n, m) if p not in known]
    return Places(modules, adaptable, linear, experts, loose)


def label(name: str, module: nn.Module | None) -> str | None:
    """Return what a module is to a method: a layer's kind, `block`, or one of `BEYOND`."""
    if module is None:
        return None
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if is_convolution(module):
        return "convolution"
    found = matrix_kind(module)
    return found or ("block" if name.rsplit(".", 1)[-1] in BLOCKS else None)


def is_a_product(module: nn.Module) -> bool:
    """Return whether a linear layer gives a tensor of its product's shape, as a router may not."""
    return kind(module) is not None or gives_product(module)


def passed_over(model: nn.Module, chosen: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield what holds a matrix, is no linear layer and is not among `chosen`, and what it is."""
    attention: set[str] = set()
    for name, module in own_modules(model):
        if isinstance(module, nn.MultiheadAttention):
            attention.add(name)
            if name not in chosen:
                yield name, "attention module"
            continue
        inside = name.rpartition(".")[0] in attention
        if name in chosen or inside or isinstance(module, ParametrizationList):
            continue
        what = described(module)
        if what is not None:
            yield name, what
            continue
        stacks = list(expert_stacks(name, module))
        yield from ((each, "3-D expert weights") for each in stacks if each not in chosen)
        for each in loose_parameters(name, module):
            held = module._parameters[each.rpartition(".")[2]]
            is_vector = held is None or sum(size > 1 for size in held.shape) < 2
            if each not in chosen and each not in stacks and not is_vector:
                yield each, f"parameter of a {own_class(module).__name__}"


def described(module: nn.Module) -> str | None:
    holds = isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS))
    if holds and is_parametrized(module, "weight"):
        return "weight that a parametrisation computes"
    if isinstance(module, CONVOLUTIONS):
        return "convolution"
    for base in (nn.Linear, nn.Embedding):
        if isinstance(module, base) and own_class(module) is not base and kind(module) is None:
            name = own_class(module).__name__
            return f"subclass {name} of {base.__name__} whose forward is its own"
    is_embedding = matrix_kind(module) == "embedding" or isinstance(module, nn.Embedding)
    return "embedding" if is_embedding else None
