"""From a layer to its storage, and from a name to a storage's class."""

from __future__ import annotations

from torch import nn

from inlay.errors import StorageError, TargetError, did_you_mean
from inlay.storage.base import FrozenLinear, Kind
from inlay.storage.bitsandbytes import ForeignLinear, is_foreign
from inlay.storage.convolution import Convolution, is_convolution
from inlay.storage.dense import VIEWS, DenseLinear
from inlay.storage.own import is_plain_linear, own_class, own_kind, own_view
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.table import DENSE, storages

for each in storages().values():
    each.load()
STORAGES: dict[str, type[QuantizedLinear]] = QuantizedLinear.formats
"""Name -> the layer class of each packed storage."""


def frozen(module: nn.Module) -> FrozenLinear:
    """Return a layer's frozen weight: itself, or a view; raise `TargetError` if it holds none."""
    if isinstance(module, FrozenLinear):
        return module
    if is_exact(module):
        return VIEWS[layer_class(module)](module)
    if is_foreign(module):
        return ForeignLinear(module)
    found = DenseLinear(module) if is_plain_linear(module) else own_view(module)
    if found is None and is_convolution(module):
        found = Convolution(module)
    if found is not None:
        return found
    known = ", ".join(sorted(c.__name__ for c in (*VIEWS, *STORAGES.values())))
    raise TargetError(
        f"a {type(module).__name__} holds no weight that can be adapted; {known}, convolutions, "
        "their subclasses and bitsandbytes' linear layers do"
    )


def kind(module: nn.Module) -> Kind | None:
    """Return which kind of plain product a layer is, or None when it is none.

    A subclass of `nn.Linear` counts when a trial shows that its forward is the plain product.
    """
    if is_exact(module):
        return VIEWS[layer_class(module)].stands_for
    if isinstance(module, FrozenLinear):
        return module.layer_kind
    return "linear" if is_foreign(module) or is_plain_linear(module) else None


def matrix_kind(module: nn.Module) -> Kind | None:
    found = kind(module) or own_kind(module)
    return "linear" if found is None and is_convolution(module) else found


def is_exact(module: nn.Module) -> bool:
    renormed = isinstance(module, nn.Embedding) and getattr(module, "max_norm", None) is not None
    return layer_class(module) in VIEWS and not renormed


def layer_class(module: nn.Module) -> type[nn.Module]:
    return own_class(module)


def storage_class(name: str) -> type[QuantizedLinear]:
    """Return the layer class of a packed storage; raise `StorageError` for an unknown name."""
    if name not in STORAGES:
        known = ", ".join(sorted((*STORAGES, DENSE)))
        raise StorageError(
            f"there is no storage {name!r}; there are {known}.{did_you_mean(name, STORAGES)}"
        )
    return STORAGES[name]
