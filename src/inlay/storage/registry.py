"""Which storage a layer's weight is in, and which storages there are."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Literal

from torch import nn

import inlay.storage
from inlay.errors import StorageError, TargetError, did_you_mean
from inlay.storage.base import FrozenLinear
from inlay.storage.bitsandbytes import ForeignLinear, is_foreign
from inlay.storage.dense import VIEWS
from inlay.storage.quantized import QuantizedLinear

for found in pkgutil.iter_modules(inlay.storage.__path__, inlay.storage.__name__ + "."):
    if found.name != __name__:
        importlib.import_module(found.name)

STORAGES: dict[str, type[QuantizedLinear]] = QuantizedLinear.formats
"""Name -> the layer class of each packed storage; a file in this folder adds its own."""

KINDS: dict[str, Literal["linear", "conv1d", "embedding"]] = {
    "DenseLinear": "linear",
    "DenseConv1D": "conv1d",
    "DenseEmbedding": "embedding",
}


def frozen(module: nn.Module) -> FrozenLinear:
    """Return the frozen weight of a layer: the layer itself, or a view of it.

    Raises:
        TargetError: the layer is not one of those that hold a matrix.
    """
    if isinstance(module, FrozenLinear):
        return module
    if layer_class(module) in VIEWS:
        return VIEWS[layer_class(module)](module)
    if is_foreign(module):
        return ForeignLinear(module)
    known = ", ".join(sorted(c.__name__ for c in (*VIEWS, *STORAGES.values())))
    raise TargetError(
        f"a {type(module).__name__} holds no weight that can be adapted; {known} and "
        "bitsandbytes' linear layers do"
    )


def kind(module: nn.Module) -> Literal["linear", "conv1d", "embedding"] | None:
    """Return which kind of layer this is to a method, or None when it holds no matrix."""
    if layer_class(module) in VIEWS:
        return KINDS[VIEWS[layer_class(module)].__name__]
    if isinstance(module, FrozenLinear):
        return module.layer_kind
    return "linear" if is_foreign(module) else None


def layer_class(module: nn.Module) -> type[nn.Module]:
    """Return the layer's class, or what it was before it was changed in place.

    Only these exact classes count: a subclass may use its weight in another way.
    """
    found = type(module)
    while "original" in vars(found):
        found = vars(found)["original"]
    return found


def storage_class(name: str) -> type[QuantizedLinear]:
    """Return the layer class of a packed storage.

    Raises:
        StorageError: there is no storage of this name.
    """
    if name not in STORAGES:
        known = ", ".join(sorted((*STORAGES, "dense")))
        raise StorageError(
            f"there is no storage {name!r}; there are {known}.{did_you_mean(name, STORAGES)}"
        )
    return STORAGES[name]
