"""Where adapters can stand: layers that hold a matrix, and single parameters of other modules.

A place is named as the module is, or as the parameter: `layers.0.mlp.experts.gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from inlay.errors import AdapterError
from inlay.model.adapters.wrapped import unwrapped
from inlay.storage.base import FrozenLinear
from inlay.storage.own import holds_floats
from inlay.storage.parameters import Parameter, is_expert_stack, projections
from inlay.storage.registry import frozen, matrix_kind


class Matrix(NamedTuple):
    """One matrix, or stack of them: the module that holds it, and which parameter if not `weight`.

    `name` is the module's; `parameter` is None where the layer is adapted as a whole.
    """

    name: str
    parameter: str | None
    view: FrozenLinear

    @property
    def place(self) -> str:
        """The dotted name of the place."""
        return self.name if self.parameter is None else f"{self.name}.{self.parameter}"


def matrices_at(model: nn.Module, name: str) -> list[Matrix]:
    """Return the matrices of a layer, of an attention module, or of one parameter.

    Raises:
        AdapterError: there is no such place.
    """
    module, parameter = module_at(model, name)
    if parameter is not None:
        owner = name.rpartition(".")[0]
        return [Matrix(owner, parameter, Parameter(module, parameter))]
    if isinstance(module, nn.MultiheadAttention):
        found = [Matrix(name, p, Parameter(module, p)) for p in projections(module)]
        below = f"{name}.out_proj" if name else "out_proj"
        return [*found, Matrix(below, None, frozen(module.out_proj))]
    return [Matrix(name, None, frozen(module))] if matrix_kind(module) else []


def module_at(model: nn.Module, place: str) -> tuple[nn.Module, str | None]:
    """Return the module at a place, and the parameter where the place is one.

    Raises:
        AdapterError: there is no such place.
    """
    owner, _, leaf = place.rpartition(".")
    try:
        above = unwrapped(model.get_submodule(owner))
    except AttributeError:
        above = None
    if place == "":
        return model, None
    if above is not None and isinstance(above._modules.get(leaf), nn.Module):
        return unwrapped(above.get_submodule(leaf)), None
    if above is not None and leaf in above._parameters:
        return above, leaf
    raise AdapterError(f"the {type(model).__name__} has no module or parameter {place!r}")


def view_at(model: nn.Module, place: str) -> FrozenLinear | None:
    """Return the matrix at a place; None where it holds none."""
    module, parameter = module_at(model, place)
    if parameter is not None:
        return Parameter(module, parameter)
    return frozen(module) if matrix_kind(module) else None


def loose_parameters(name: str, module: nn.Module) -> Iterator[str]:
    """Every parameter of a module that could be adapted by itself, by its dotted name.

    Those are matrices and stacks that no layer kind stands for, an attention's excepted.
    """
    if matrix_kind(module) is not None or isinstance(module, nn.MultiheadAttention):
        return
    for key, held in module._parameters.items():
        if held is not None and held.ndim in (2, 3) and holds_floats(module, key):
            yield f"{name}.{key}" if name else key


def expert_stacks(name: str, module: nn.Module) -> Iterator[str]:
    """Every parameter of a module that is a stack of a mixture's experts, by its dotted name."""
    said = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    if "expert" not in said and not hasattr(module, "is_transposed"):
        return
    if matrix_kind(module) is not None:
        return
    for key in module._parameters:
        if is_expert_stack(module, key):
            yield f"{name}.{key}" if name else key
