"""Triton kernels for GPUs; the PyTorch code that they replace defines the values."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from inlay.kernels.switches import is_on


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def runs_on(device: torch.device) -> bool:
    return device.type == "cuda" and is_on("triton") and has_triton()
