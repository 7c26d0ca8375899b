"""The weights that a merge would give, one after another, for an engine that wants plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.adapters.wrappers import looks_through
from inlay.model.merge.merge import check_mergeable
from inlay.model.merge.plan import trained_copy
from inlay.storage.base import FrozenLinear


@looks_through
@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight by the name it has in the plain model, the active adapters merged in.

    Weights are dense, in the dtype that the base computes in, and made when they are asked for;
    the model stays as it is. A tied weight comes once, unless an adapter parts it from the other.
    """
    check_mergeable(model)
    seen: set[nn.Parameter] = set()
    for name, module in own_modules(model):
        for leaf, tensor in weights_of(module):
            if tensor in seen:
                continue
            if isinstance(tensor, nn.Parameter):
                seen.add(tensor)
            yield f"{name}.{leaf}" if name else leaf, tensor.detach()


def weights_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, AdaptedLayer) and module.keeps_class:
        yield from kept_weights(module)
    elif isinstance(module, AdaptedLayer) and module.weight_methods():
        assert module.base is not None
        w, bias = module.adapted_weight()
        yield from named(module.base.turned(w.to(module.base.dtype)), bias)
    elif isinstance(module, FrozenLinear):
        yield from named(module.turned(module.dequantize()), module.bias)
    else:
        for leaf, own in module._parameters.items():
            copy = trained_copy(module, leaf) if isinstance(module, AdaptedLayer) else None
            if own is not None:
                yield leaf, own if copy is None else copy.to(own.dtype)


def kept_weights(layer: AdaptedLayer) -> Iterator[tuple[str, Tensor]]:
    new = {n: t for _, _, found in layer.merged_parameters() for n, t in found.items()}
    for leaf, own in layer._parameters.items():
        if own is not None:
            copy = trained_copy(layer, leaf)
            changed = new.get(leaf, copy)
            yield leaf, own if changed is None else changed.to(own.dtype)


def named(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    yield "weight", weight
    if bias is not None:
        yield "bias", bias.to(weight.dtype)
