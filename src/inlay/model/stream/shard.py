"""Divide a model's frozen weights among processes, with PyTorch's FSDP2, packed ones included.

Each Transformer block is gathered just ahead of use, forward and backward, and let go of again;
what lies outside the blocks is gathered for a whole step. Packed bytes are gathered as they are.
What trains stays whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from inlay.errors import ModelError
from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.process import lease
from inlay.model.stream.host import is_streamed
from inlay.storage.quantized import QuantizedLinear

SMALL = 1 << 10
"""Bytes below which a packed part, such as a table of 256 values, stays whole everywhere."""


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Divide the frozen weights of a model among the processes of a mesh, in place.

    What trains now stays whole in every process. The mesh has one dimension; the model is moved to
    its kind of device. Raises `ModelError` where the model is streamed, or a frozen weight was not
    divided.
    """
    if is_streamed(model):
        raise ModelError(
            "a streamed model cannot be divided among processes: its weights lie in files or in "
            "host memory; leave stream at off, or parallel at ddp"
        )
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.hold_as_parameters(SMALL)
        if isinstance(layer, AdaptedLayer):
            layer.__dict__["divided"] = True  # gathered for each use, and never another weight
    whole = kept_whole(model)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    lease(model, "view warnings")
    name = type(model).__name__
    fully_shard(model, mesh=mesh, ignored_params=whole)
    type(model).__name__ = name
    check_sharded(model, whole)
    return model


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Return what trains, and the parameters that trained copies stand in for.

    Where a copy is active a module shows FSDP the copy in the parameter's place.
    """
    trained = {p for p in model.parameters() if p.requires_grad}
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptedLayer)]
    copied = {
        layer._parameters.get(name)
        for layer in layers
        for params in layer.adapters.values()
        for name, _ in params.named_parameters(recurse=False)
    }
    return trained | {p for p in copied if p is not None}


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model's repeated blocks, but none inside another."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside.update(module.modules())
            yield from module


def check_sharded(model: nn.Module, kept: set[nn.Parameter]) -> None:
    whole = [
        name for name, p in model.named_parameters() if p not in kept and not isinstance(p, DTensor)
    ]
    if whole or not isinstance(model, FSDPModule):
        raise ModelError(
            f"{len(whole)} frozen weights of this {type(model).__name__} were not divided among "
            f"the processes, such as {whole[:1]}; give 'parallel: ddp'"
        )


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def resident_bytes(model: nn.Module) -> int:
    frozen = [p for p in model.parameters() if not p.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
    return sum(t.nbytes for t in [*local, *model.buffers()])


def let_go(model: nn.Module) -> None:
    """Free what a no-grad pass leaves gathered: the weights outside the blocks."""
    if isinstance(model, FSDPModule):
        model.reshard()
