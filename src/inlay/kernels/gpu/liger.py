"""Liger's norms and gates as plain functions: called where needed, no class of a model patched.

RoPE stays as transformers has it: it is a function of a model's module, which could only be
replaced for every model of the process.
"""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from inlay.kernels.gpu import runs_on


@cache
def has_liger() -> bool:
    return find_spec("liger_kernel") is not None


def takes(device: torch.device) -> bool:
    return runs_on(device) and has_liger()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))`, the quotient rounded to x's dtype first."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`; act is `silu` or `gelu_tanh`. Backward overwrites gate and up."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = LigerSiLUMulFunction if act == "silu" else LigerGELUMulFunction
    return function.apply(gate, up)
