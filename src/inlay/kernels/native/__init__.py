"""CPU kernels in C, torch-free, compiled at first use: products, loss, norm, gate, NF4, int8.

Each function runs on any device and dtype: by the C library on contiguous CPU tensors of a dtype
that it knows, else by the same steps in torch (`reference`). None of them records gradients; they
are what opaque operators are made of. `use("off")`, or INLAY_NATIVE=0, switches the library off.

The functions for NF4, and the products, have no torch version here: they say that they did nothing,
and the storage runs its own torch code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.errors import DataError
from inlay.kernels.native import reference
from inlay.kernels.native.allocator import keep_memory, release_memory, return_free_memory
from inlay.kernels.native.build import status, use
from inlay.kernels.native.calls import (
    BLOCK,
    INPUTS,
    NESTED_BLOCK,
    OUTPUTS,
    available,
    called,
    nf4_parts,
    sized,
    takes,
)
from inlay.kernels.native.products import (
    STRIP,
    int8_product,
    keeps_sums,
    multiplies,
    nf4_product,
    product,
)
from inlay.kernels.native.reference import LossSums

__all__ = [
    "OUTPUTS",
    "STRIP",
    "LossSums",
    "available",
    "int8_dequantize",
    "int8_product",
    "int8_quantize",
    "int8_rescale",
    "keep_memory",
    "keeps_sums",
    "loss_part",
    "loss_tile",
    "multiplies",
    "nf4_dequantize",
    "nf4_nest",
    "nf4_product",
    "nf4_quantize",
    "nf4_to_int8",
    "product",
    "release_memory",
    "return_free_memory",
    "rms_norm",
    "rms_norm_backward",
    "silu_gate",
    "silu_gate_backward",
    "status",
    "use",
]

# ---- NF4 ----


def nf4_quantize(flat: Tensor) -> tuple[Tensor, Tensor] | None:
    """Quantise n numbers to NF4: packed bytes (⌈n/2⌉, 1), absmax (⌈n/64⌉,); None if it cannot."""
    if not takes(INPUTS, flat):
        return None
    count = flat.numel()
    packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-count // BLOCK))
    called("inlay_nf4_quantize", flat, flat.dtype, count, packed, absmax)
    return packed, absmax


def nf4_nest(absmax: Tensor, offset: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor] | None:
    """Quantise absmax - offset to 8 bits: codes (n,), scale (⌈n/256⌉,); None if it cannot.

    midpoints: (255,), the thresholds between the 256 codes' values.
    """
    if not (takes((torch.float32,), absmax, midpoints) and sized(255, midpoints)):
        return None
    count = absmax.numel()
    codes = torch.empty(count, dtype=torch.uint8)
    scale = torch.empty(-(-count // NESTED_BLOCK))
    called("inlay_nf4_nest", absmax, count, float(offset), midpoints, codes, scale)
    return codes, scale


def nf4_dequantize(parts: Sequence[Tensor], out: Tensor, first: int) -> bool:
    """Write rows [first, first + len(out)) of the dense matrix into `out`; say whether it did."""
    if not takes(OUTPUTS, out):
        return False
    begin = first * out.shape[1]
    held = nf4_parts(parts, begin + out.numel())
    if held is None:
        return False
    called("inlay_nf4_dequantize", ctypes.byref(held), out, out.dtype, begin, out.numel())
    return True


def nf4_to_int8(parts: Sequence[Tensor], q: Tensor, scale: Tensor, first: int) -> bool:
    """Write rows as `q = round(w / scale)`; q: int8 (m, in), scale: fp32 (m,); say whether it did.

    A row's scale is the largest absmax of the blocks that it touches, over 127.
    """
    if not (takes((torch.int8,), q) and takes((torch.float32,), scale) and sized(len(q), scale)):
        return False
    held = nf4_parts(parts, (first + len(q)) * q.shape[1])
    if held is None:
        return False
    called("inlay_nf4_to_int8", ctypes.byref(held), q, scale, first, *q.shape)
    return True


# ---- int8 ----


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows: `q = round(127 x / absmax)` int8 (m, n), absmax fp32 (m,); x: (m, n)."""
    if x.ndim != 2 or not takes(INPUTS, x):
        return reference.int8_quantize(x)
    q, absmax = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    called("inlay_int8_quantize", x, x.dtype, *x.shape, q, absmax)
    return q, absmax


def int8_dequantize(q: Tensor, absmax: Tensor, out: Tensor) -> None:
    """Write `q * absmax / 127` into `out`; q: int8 (m, n), absmax: fp32 (m,)."""
    ready = takes((torch.int8,), q) and takes((torch.float32,), absmax) and takes(OUTPUTS, out)
    if not (ready and sized(q.shape, out) and sized(len(q), absmax)):
        out.copy_(q * absmax[:, None] * (1 / 127))
        return
    called("inlay_int8_dequantize", q, absmax, out, out.dtype, *q.shape)


def int8_rescale(sums: Tensor, rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """Write `sums * rows[:, None] * columns` into `out`; sums: int32 (m, n); scales fp32.

    `out` may be some columns of a wider matrix.
    """
    ready = takes((torch.int32,), sums) and takes((torch.float32,), rows, columns)
    fits = sized(sums.shape, out) and sized(len(sums), rows) and sized(sums.shape[1], columns)
    if not (ready and takes(OUTPUTS, out[:1]) and fits):
        out.copy_(sums * rows[:, None] * columns)
        return
    called("inlay_int8_rescale", sums, rows, columns, out, out.dtype, out.stride(0), *sums.shape)


# ---- the loss ----


def loss_tile(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each label's log-probability, the entropy in nats and whether no logit is larger.

    In place the logits become the gradient of the log-probability, `onehot - softmax`.
    logits: (m, vocabulary), labels: (m,) int64 -> fp32 (m,), fp32 (m,), bool (m,).
    """
    ready = takes((torch.float32,), logits) and takes((torch.int64,), labels)
    if not (ready and sized(len(logits), labels)):
        check_labels(logits.shape[1], labels)
        return reference.loss_tile(logits, labels)
    log_p, entropy = torch.empty(2, len(logits)).unbind()
    top1 = torch.empty(len(logits), dtype=torch.bool)
    rows, vocabulary = logits.shape
    sizes = (vocabulary, rows, vocabulary)
    wrong = called("inlay_loss", logits, *sizes, labels, log_p, entropy, top1)
    if wrong >= 0:
        check_labels(logits.shape[1], labels)
    return log_p, entropy, top1


def loss_part(logits: Tensor, labels: Tensor, first: int, sums: LossSums, out: Tensor) -> Tensor:
    """Add the logits of tokens from `first` on to each row's sums; they are overwritten.

    `out` gets exp(logit - highest), but for the label's, which is left out.
    logits: (m, part) fp32, labels: (m,) int64, out: (m, part) fp32 or bf16 -> (m,) fp32, what the
    terms of earlier parts are to be multiplied by.
    """
    ready = takes((torch.float32,), logits) and takes((torch.int64,), labels)
    if not (ready and takes(OUTPUTS, out) and sized(logits.shape, out)):
        return reference.loss_part(logits, labels, first, sums, out)
    scale = torch.empty(len(logits))
    part = logits.shape[1]
    called(
        "inlay_loss_part", logits, first, part, labels, *sums, scale, out, out.dtype, len(logits)
    )
    return scale


def check_labels(vocabulary: int, labels: Tensor) -> None:
    wrong = labels[(labels < 0) | (labels >= vocabulary)]
    if wrong.numel():
        raise DataError(
            f"label {int(wrong[0])} is outside the vocabulary of {vocabulary}; rows without a "
            "label must be dropped before the loss"
        )


# ---- RMSNorm, the gate ----


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `weight * x * rstd` and `rstd = (mean(x²) + eps)^-½`, rounded as transformers does.

    x: (*b, n), weight: (n,) of x's dtype -> (*b, n) in that dtype, fp32 (*b,).
    """
    x = x.contiguous()
    if not (takes(OUTPUTS, x, weight) and sized(x.shape[-1], weight)):
        return reference.rms_norm(x, weight, eps)
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1])
    called("inlay_norm", x, weight, float(eps), y, rstd, x.dtype, rstd.numel(), x.shape[-1])
    return y, rstd


def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient with respect to x, in its dtype; g: (*b, n), the gradient of y."""
    g, x = g.contiguous(), x.contiguous()
    fits = sized(x.shape, g) and sized(x.shape[-1], weight) and sized(x.shape[:-1], rstd)
    if not (takes(OUTPUTS, g, x, weight) and takes((torch.float32,), rstd) and fits):
        return reference.rms_norm_backward(g, x, weight, rstd)
    gx = torch.empty_like(x)
    sizes = (rstd.numel(), x.shape[-1])
    called("inlay_norm_backward", g, x, weight, rstd, gx, x.dtype, *sizes)
    return gx


def silu_gate(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `silu(gate) * up`, silu rounded to the dtype first; `out` may be gate or up."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate) if out is None else out
    if not (takes(OUTPUTS, gate, up, h) and sized(gate.shape, up, h)):
        return h.copy_(reference.silu_gate(gate, up))
    called("inlay_gate", gate, up, h, gate.dtype, gate.numel())
    return h


def silu_gate_backward(
    g: Tensor, gate: Tensor, up: Tensor, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and `h = silu(gate) * up` again.

    g: the gradient of h. The tensors of `out` are written to; each may be g, gate or up.
    """
    g, gate, up = g.contiguous(), gate.contiguous(), up.contiguous()
    g_gate, g_up, h = out or (torch.empty_like(gate) for _ in range(3))
    tensors = (g, gate, up, g_gate, g_up, h)
    if takes(OUTPUTS, *tensors) and sized(gate.shape, *tensors):
        called("inlay_gate_backward", g, gate, up, g_gate, g_up, h, gate.dtype, gate.numel())
        return g_gate, g_up, h
    found = reference.silu_gate_backward(g, gate, up)
    return g_gate.copy_(found[0]), g_up.copy_(found[1]), h.copy_(found[2])
