"""Leave a model's large weights in host memory or in files, and bring them in ahead of use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import ModelError, StorageError
from inlay.model.adapters.wrappers import looks_through
from inlay.model.load.heads import to_train
from inlay.model.load.quantize import check_not_adapted, shared_parameters
from inlay.storage.buffers import Buffers, Statistics
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.registry import frozen, storage_class
from inlay.storage.sources import SMALL, Layout, Rows, Segment, Source
from inlay.storage.streamed import StreamedEmbedding, StreamedLinear
from inlay.storage.weights_file import FileTensor, HostTensor, Stored

BUFFERS = 2
"""Blocks in memory at once: one in use, one on its way."""


@looks_through
def stream(
    model: nn.Module, device: str | torch.device | None = None, *, buffers: int = BUFFERS
) -> nn.Module:
    """Leave the model's large weights in host memory, in place, and bring them to `device`.

    Each block of the model is copied to the device just ahead of use, forward and backward; what
    is small, and what will be trained, lies on the device. To stream from files, see `load`.

    Args:
        model: a model on the CPU without adapters; quantised or dense.
        device: where the model runs; default: the first GPU, else the CPU.
        buffers: blocks on the device at once, at least 2.

    Returns:
        The model; its streamed layers are new modules under the same names.

    Raises:
        ModelError: the model carries adapters, or has no layer to stream.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_not_adapted(model)
    weights: dict[str, Weight] = {}
    heads = to_train(model)
    for name, module in model.named_modules():
        if any(name == head or name.startswith(f"{head}.") for head in heads):
            continue
        if isinstance(module, QuantizedLinear) and not isinstance(module, StreamedLinear):
            weights[name] = Weight(module.storage, module.shape, on_host(module.parts()))
        elif type(module) in (nn.Linear, nn.Embedding):
            weight = module._parameters["weight"]
            assert weight is not None
            shape = (weight.shape[0], weight.shape[1])
            weights[name] = Weight("dense", shape, [HostTensor(weight.detach())])
    return connect(model, weights, where, buffers).to(where)


def on_host(parts: Sequence[Tensor]) -> list[Tensor | Stored]:
    return [HostTensor(p.detach()) if p.nbytes >= SMALL else p.detach() for p in parts]


class Weight:
    """A weight to be streamed: its format, shape (out, in) and packed parts."""

    def __init__(
        self, packing: str, shape: tuple[int, int], parts: Sequence[Tensor | Stored]
    ) -> None:
        self.packing, self.shape, self.parts = packing, shape, parts

    def laid_out(self, layout: Layout, name: str, device: torch.device) -> list[Segment]:
        block = block_name(name)
        first = self.parts[0]
        if self.packing == "dense" and not isinstance(first, Tensor):
            return layout.dense(block, first)
        parts = [p.to(device) if isinstance(p, Tensor) else p for p in self.parts]
        return layout.packed(block or name, self.shape[0], parts)


def connect(
    model: nn.Module, weights: Mapping[str, Weight], device: torch.device, buffers: int
) -> nn.Module:
    layout = Layout()
    segments: dict[str, list[Segment]] = {}
    for name, module in model.named_modules():
        if name in weights and not isinstance(module, nn.Embedding):
            segments[name] = weights[name].laid_out(layout, name, device)
    if not segments:
        raise ModelError(f"{type(model).__name__} has no linear layer that could be streamed")
    shared = Buffers(layout.blocks, buffers, device)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        model.set_submodule(name, streamed_layer(layer, weight, segments.get(name), shared))
    return model


def streamed_layer(
    layer: nn.Module, weight: Weight, segments: list[Segment] | None, buffers: Buffers
) -> nn.Module:
    if segments is not None:
        source, held = Source(weight.packing, segments, buffers), frozen(layer)
        new = StreamedLinear(source, weight.shape, held.dtype, held.bias)
        return new.train(layer.training)
    table = weight.parts[0]
    assert isinstance(layer, nn.Embedding)
    assert not isinstance(table, Tensor)
    return StreamedEmbedding(Rows(table, buffers.device), layer).train(layer.training)


def embedding_on_host(model: Any, device: str | torch.device) -> nn.Module:
    """Leave the input embedding in host memory, in place; raise if tied or of another class."""
    layer = model.get_input_embeddings()
    name = next((n for n, m in model.named_modules() if m is layer), None)
    if name is None or type(layer) is not nn.Embedding:
        raise ModelError(
            f"{type(model).__name__} reads its input by a {type(layer).__name__}, but only a plain "
            "embedding can lie in host memory; leave embedding_storage at 'dense'"
        )
    if id(layer.weight) in shared_parameters(model):
        raise ModelError(
            f"the embedding of {type(model).__name__} is its output head too (their weights are "
            "tied), which every step multiplies by, so that it cannot lie in host memory; leave "
            "embedding_storage at 'dense'"
        )
    table = HostTensor(layer.weight.detach().cpu())
    new = StreamedEmbedding(Rows(table, torch.device(device)), layer)
    model.set_submodule(name, new.train(layer.training))
    return model


@looks_through
def is_streamed(model: nn.Module) -> bool:
    return any(isinstance(m, StreamedLinear) for m in model.modules())


def statistics(model: nn.Module) -> Statistics:
    for module in model.modules():
        if isinstance(module, StreamedLinear):
            return module.source.buffers.statistics
    raise ModelError(f"no layer of this {type(model).__name__} is streamed")


def block_name(name: str) -> str | None:
    found = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else None


def file_weights(
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, FileTensor],
    key_of: Callable[[str], str],
    storages: Mapping[str, str],
) -> dict[str, Weight]:
    """Return the weights of these layers as they lie in files; `key_of`: layer -> key there."""
    found: dict[str, Weight] = {}
    for name, module in modules.items():
        key = key_of(name)
        packed = {k: t for k, t in tensors.items() if k.startswith(key + ".")}
        packed |= {f"{key.removesuffix('weight')}{k}": t for k, t in beside(key, tensors).items()}
        weight = tensors[key]
        if not packed:
            shape = (weight.shape[0], weight.shape[1])
            found[name] = Weight("dense", shape, [weight])
            continue
        try:
            found[name] = packed_weight(storages[name], key, {key: weight, **packed}, module)
        except StorageError as error:
            raise StorageError(f"{name}: {error}") from None
    return found


def beside(key: str, tensors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """Return int8's tensors that belong to a weight."""
    layer = key.removesuffix("weight")
    names = ("SCB", "weight_format")
    return {n: tensors[layer + n] for n in names if layer + n in tensors}


def packed_weight(
    storage: str, key: str, tensors: Mapping[str, FileTensor], module: nn.Module
) -> Weight:
    """Return a packed weight, its large parts as places in files; the storage checks the fit."""
    layer = key.removesuffix("weight")
    large = {k.removeprefix(layer): t for k, t in tensors.items() if t.nbytes >= SMALL}
    given = {k.removeprefix(layer): t.load() for k, t in tensors.items() if t.nbytes < SMALL}
    given |= {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in large.items()}
    held = storage_class(storage).restored(given)
    names = {id(part): n for n, part in held.held().items()}
    parts: list[Tensor | Stored] = []
    for part in held.parts():
        name = names[id(part)]
        at = large.get(name) or large.get(f"weight.{name}")
        parts.append(part.detach() if at is None else at.seen_as(part.dtype, tuple(part.shape)))
    return Weight(storage, held.shape, parts)
