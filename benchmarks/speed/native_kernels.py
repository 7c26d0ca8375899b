"""The C kernels against bitsandbytes' CPU code and torch's, alternately, in one process.

    python -m benchmarks.speed.native_kernels [alternations]

Writes figures/native_kernels.json: medians and ranges in ms, and the median ratio of each pair.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.machine import write
from inlay.kernels import native
from inlay.kernels.epilogue import Epilogue
from inlay.kernels.formats import DENSE
from inlay.kernels.matrix import Matrix
from inlay.kernels.scratch import tile_rows
from inlay.storage.nf4 import NF4Linear

TOKENS, HIDDEN, GATED, VOCABULARY = 512, 896, 4864, 151_936
LOSS_ROWS = 64

Contest = dict[str, Callable[[], object]]


def milliseconds(action: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    return (time.perf_counter() - start) / repeats * 1e3


def alternated(contest: Contest, rounds: int, repeats: int) -> dict[str, Any]:
    """Time the actions in turn; the ratio is the other's time over ours, round by round."""
    times: dict[str, list[float]] = {name: [] for name in contest}
    for action in contest.values():
        action()
    for _ in range(rounds):
        for name, action in contest.items():
            times[name].append(milliseconds(action, repeats))
    found: dict[str, Any] = {
        name: {"median_ms": statistics.median(t), "range_ms": [min(t), max(t)]}
        for name, t in times.items()
    }
    ours, *others = times
    for other in others:
        ratios = [b / a for a, b in zip(times[ours], times[other], strict=True)]
        found[f"{other} / {ours}"] = {
            "median": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
    return found


def quantising(dtype: torch.dtype, double_quant: bool) -> Contest:
    from bitsandbytes.functional import quantize_4bit

    w = torch.randn(4096, 4096).to(dtype)
    layer = NF4Linear.quantized(w, None, double_quant=double_quant)
    theirs, state = quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(layer.packed_weight.view(-1), theirs.view(-1))
    assert torch.equal(layer.absmax, state.absmax)
    return {
        "inlay": lambda: NF4Linear.quantized(w, None, double_quant=double_quant),
        "bitsandbytes": lambda: quantize_4bit(
            w, quant_type="nf4", compress_statistics=double_quant
        ),
    }


def dequantising(dtype: torch.dtype) -> Contest:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = torch.randn(4096, 4096).to(dtype)
    layer = NF4Linear.quantized(w, None)
    theirs, state = quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.dequantize(), dequantize_4bit(theirs, state))
    rows = 256
    tile = torch.empty(rows, 4096, dtype=dtype)

    def by_tiles() -> None:
        for first in range(0, 4096, rows):
            native.nf4_dequantize(layer.parts(), tile, first)

    return {
        "inlay, tile by tile": by_tiles,
        "inlay, a new matrix": layer.dequantize,
        "bitsandbytes": lambda: dequantize_4bit(theirs, state),
    }


def share_of_product(dtype: torch.dtype) -> Contest:
    """A tile's dequantisation and the product that uses it: its share is the ratio's inverse."""
    layer = NF4Linear.quantized(torch.randn(GATED, HIDDEN), None)
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    rows = tile_rows(GATED, HIDDEN, dtype, x.device)
    tile, y = torch.empty(rows, HIDDEN, dtype=dtype), torch.empty(TOKENS, GATED, dtype=dtype)
    starts = range(0, GATED - rows + 1, rows)

    def unpack() -> None:
        for first in starts:
            native.nf4_dequantize(layer.parts(), tile, first)

    def multiply() -> None:
        for first in starts:
            torch.mm(x, tile.t(), out=y[:, first : first + rows])

    return {"dequantise": unpack, "multiply": multiply}


def multiplying(tokens: int, rows: int, columns: int, transposed: bool) -> Contest:
    """A product with a bfloat16 weight: packed from it, by widened tiles, as PyTorch has it."""
    assert native.multiplies()
    x, w = torch.randn(tokens, columns), torch.randn(rows, columns).bfloat16()
    g, halves = torch.randn(tokens, rows), x.bfloat16()
    weight, end = Matrix([w], DENSE, rows, columns, halves), Epilogue(torch.float32)

    def multiply() -> Tensor:
        return weight.times_t(g, end) if transposed else weight.times(x, end)

    def by_tiles() -> Tensor:
        with native.use("off"):
            return multiply()

    wide = w.float()
    return {
        "inlay": multiply,
        "tile by tile": by_tiles,
        "a float32 weight": lambda: g @ wide if transposed else F.linear(x, wide),
        "bfloat16 by torch": lambda: g.bfloat16() @ w if transposed else F.linear(halves, w),
    }


def gating() -> Contest:
    gate, up, g = torch.randn(3, TOKENS, GATED).bfloat16().unbind()
    out = tuple(torch.empty_like(gate) for _ in range(3))

    def by_torch() -> tuple[Tensor, Tensor, Tensor]:
        act = F.silu(gate)
        return torch.ops.aten.silu_backward(g * up, gate), g * act, act * up

    return {
        "inlay": lambda: (
            native.silu_gate(gate, up, out[0]),
            native.silu_gate_backward(g, gate, up, out),
        ),
        "torch": lambda: (F.silu(gate) * up, by_torch()),
    }


def norming() -> Contest:
    x, g = torch.randn(2, TOKENS, HIDDEN).bfloat16().unbind()
    weight = torch.ones(HIDDEN).bfloat16()

    def both() -> Tensor:
        _, rstd = native.rms_norm(x, weight, 1e-6)
        return native.rms_norm_backward(g, x, weight, rstd)

    def by_torch() -> Tensor:
        with native.use("off"):
            return both()

    return {"inlay": both, "torch": by_torch}


def losing() -> Contest:
    logits, spare = torch.randn(2, LOSS_ROWS, VOCABULARY).unbind()
    labels = torch.randint(VOCABULARY, (LOSS_ROWS,))

    def by_torch() -> Tensor:
        leaf = spare.detach().requires_grad_()
        F.cross_entropy(leaf, labels, reduction="sum").backward()
        assert leaf.grad is not None
        return leaf.grad

    return {"inlay": lambda: native.loss_tile(logits, labels), "torch": by_torch}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    result: dict[str, Any] = {
        "native": native.status().split(":")[0],
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    contests: list[tuple[str, Contest, int]] = [
        ("quantise fp32 4096x4096", quantising(torch.float32, False), 1),
        ("quantise bf16 4096x4096", quantising(torch.bfloat16, False), 1),
        ("quantise bf16 4096x4096, double", quantising(torch.bfloat16, True), 1),
        ("dequantise fp32 4096x4096", dequantising(torch.float32), 3),
        ("dequantise bf16 4096x4096", dequantising(torch.bfloat16), 3),
        (f"{GATED}x{HIDDEN} fp32, {TOKENS} tokens", share_of_product(torch.float32), 10),
        *(
            (f"{kind} of {tokens} tokens by {rows}x{columns}", contest, 5)
            for tokens in (1, 64, TOKENS)
            for rows, columns in ((GATED, HIDDEN), (HIDDEN, GATED), (HIDDEN, HIDDEN))
            for kind, contest in (
                ("x @ W.T", multiplying(tokens, rows, columns, False)),
                ("g @ W", multiplying(tokens, rows, columns, True)),
            )
        ),
        ("gate, forward and backward, bf16", gating(), 5),
        ("RMSNorm, forward and backward, bf16", norming(), 20),
        (f"loss, {LOSS_ROWS} rows of {VOCABULARY}", losing(), 1),
    ]
    for name, contest, repeats in contests:
        result[name] = alternated(contest, rounds, repeats)
        print(name)
        for key, value in result[name].items():
            print(f"  {key}: {value.get('median_ms', value.get('median')):.3f}")
    print(write("native_kernels", result))


if __name__ == "__main__":
    main()
