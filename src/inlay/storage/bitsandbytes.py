"""bitsandbytes' own layers, used through the storages that read the same bytes.

The layer stays the model's; its tensors are shared, not copied. Its own products are not used:
on CPU they give wrong gradients after an evaluation, and wrong values for some widths.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import StorageError
from inlay.kernels.frozen import biased_linear
from inlay.storage.base import FrozenLinear, Packed
from inlay.storage.int8 import Int8Linear
from inlay.storage.nf4 import NF4Linear, as_bytes
from inlay.storage.quantized import QuantizedLinear


def matters(record: logging.LogRecord) -> bool:
    """Hide, once, the warning of bitsandbytes' import that its CPU product is missing."""
    hidden = str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
    if hidden:
        logger.removeFilter(matters)
    return not hidden


logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
if "bitsandbytes" not in sys.modules:
    logger.addFilter(matters)

COMPUTE_DTYPE = "computes_in"
"""The attribute of an 8-bit layer in which `tell_dtype` records its model's dtype."""


class ForeignLinear(FrozenLinear):
    """A bitsandbytes layer seen through the storage that reads its bytes."""

    storage = "bitsandbytes"
    replaces_forward = True  # on a CPU it repacks the weight, which makes it unreadable

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @property
    def held(self) -> QuantizedLinear:
        """The layer's present tensors in Inlay's own storage; nothing is copied."""
        layer: Any = self.layer
        return held_int8(layer) if "8bit" in type(layer).__name__ else held_nf4(layer)

    @property
    def shape(self) -> tuple[int, int]:
        layer: Any = self.layer
        return layer.out_features, layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def device(self) -> torch.device:
        return self.held.device

    @property
    def bias(self) -> Tensor | None:
        layer: Any = self.layer
        return layer.bias

    def matmul(self, x: Tensor) -> Tensor:
        return self.held.matmul(x)

    def matmul_t(self, g: Tensor) -> Tensor:
        return self.held.matmul_t(g)

    def packed(self) -> Packed | None:
        return self.held.packed()

    def linear(self, x: Tensor) -> Tensor:
        held = self.held
        if self.bias is None:
            return held.matmul(x)
        held.check_input(x, held.in_features)
        return biased_linear(x, self.bias, *held.packed())

    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        return self.held.dequantize(rows)

    def requantized(self, w: Tensor, bias: Tensor | None) -> nn.Module:
        return self.held.requantized(w, bias)


def is_foreign(layer: nn.Module) -> bool:
    names = {f"{c.__module__.split('.')[0]}.{c.__name__}" for c in type(layer).__mro__}
    return bool(names & {"bitsandbytes.Linear4bit", "bitsandbytes.Linear8bitLt"})


def held_nf4(layer: Any) -> NF4Linear:
    state = layer.weight.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise StorageError(
            "the bitsandbytes layer holds no plain 4-bit weight: it was never quantised, or was "
            "repacked for evaluation on CPU, which loses bits; load the model again"
        )
    if state.quant_type != "nf4" or state.blocksize != 64:
        raise StorageError(
            f"the bitsandbytes layer is {state.quant_type!r} in blocks of {state.blocksize}; "
            "only 'nf4' in blocks of 64 can be read"
        )
    parts = {"weight": as_bytes(layer.weight.data), "absmax": state.absmax}
    if state.nested:
        parts["nested_absmax"] = state.state2.absmax
        parts["nested_quant_map"] = state.state2.code
        parts["nested_offset"] = state.offset
    return NF4Linear(tuple(state.shape), state.dtype, layer.bias, **parts)


def held_int8(layer: Any) -> Int8Linear:
    weight = layer.weight
    absmax = weight.SCB if weight.SCB is not None else layer.state.SCB
    if weight.dtype != torch.int8 or absmax is None:
        raise StorageError(
            "the bitsandbytes layer holds no int8 weight; move the model to its device first, "
            "which quantises it"
        )
    shape = (layer.out_features, layer.in_features)
    return Int8Linear(shape, dtype_of(layer), layer.bias, weight=weight.data, SCB=absmax)


def dtype_of(layer: nn.Module) -> torch.dtype:
    bias = layer._parameters.get("bias")
    return vars(layer).get(COMPUTE_DTYPE, torch.float16) if bias is None else bias.dtype


def tell_dtype(model: nn.Module) -> None:
    """Record the model's dtype on its 8-bit layers, which keep none."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    for layer in model.modules() if own else ():
        if is_foreign(layer) and "8bit" in type(layer).__name__:
            vars(layer)[COMPUTE_DTYPE] = own


def forget_dtype(model: nn.Module) -> None:
    for layer in model.modules():
        vars(layer).pop(COMPUTE_DTYPE, None)
