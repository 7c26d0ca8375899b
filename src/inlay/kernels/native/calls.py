"""Calls of the C library: which tensors it reads, and its structures for packed weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.native.build import library

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INPUTS = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = (torch.float32, torch.bfloat16)
PLAIN = (Tensor, torch.nn.Parameter)
BLOCK = 64
"""Weights in a block of NF4."""
NESTED_BLOCK = 256
"""Blocks whose scales are quantised together."""


class NF4Parts(ctypes.Structure):
    """`struct nf4` of the C sources."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("absmax", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_map", ctypes.c_void_p),
        ("offset", ctypes.c_float),
    ]


def available() -> bool:
    return library() is not None


def called(name: str, *arguments: Any) -> int:
    """Call a C function with tensors as addresses, numbers as 64 bits, on torch's threads."""
    found = library()
    assert found is not None
    function = getattr(found, name)
    function.restype = ctypes.c_int64
    return function(*map(converted, arguments), torch.get_num_threads())


def converted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int(CODES[value])
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


def takes(dtypes: Sequence[torch.dtype], *tensors: Tensor) -> bool:
    """Return whether the library reads these tensors: CPU, contiguous, all of one such dtype."""
    return tensors[0].dtype in dtypes and all(
        type(t) in PLAIN and t.device.type == "cpu" and t.is_contiguous()
        and t.dtype == tensors[0].dtype
        for t in tensors
    ) and available()  # fmt: skip


def sized(size: int | torch.Size, *tensors: Tensor) -> bool:
    shape = (size,) if isinstance(size, int) else size
    return all(t.shape == shape for t in tensors)


def nf4_parts(parts: Sequence[Tensor], end: int) -> NF4Parts | None:
    """Return the packed parts as C takes them; None if it cannot read `end` weights of them."""
    packed, scales, *nested = parts
    kinds = ((torch.uint8,), (torch.uint8,) if nested else (torch.float32,), (torch.float32,))
    groups = [group for group in ([packed], [scales], nested) if group]
    if not all(takes(kind, *group) for kind, group in zip(kinds, groups, strict=False)):
        return None
    if 2 * packed.numel() < end or scales.numel() * BLOCK < end:
        return None
    if not nested:
        return NF4Parts(packed.data_ptr(), packed.numel(), scales.data_ptr())
    nested_absmax, nested_map, offset = nested
    if nested_map.numel() != 256 or nested_absmax.numel() * BLOCK * NESTED_BLOCK < end:
        return None
    addresses = [scales.data_ptr(), nested_absmax.data_ptr(), nested_map.data_ptr()]
    return NF4Parts(packed.data_ptr(), packed.numel(), None, *addresses, float(offset))
