"""Compile every Triton kernel for Hopper, which needs no GPU, and read what came out."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inlay.kernels.gpu import fp8, nf4

HOPPER = GPUTarget("cuda", 90, 32)
NESTED = {
    "absmax": "*u8",
    "nested_absmax": "*fp32",
    "nested_map": "*fp32",
    "offset": "*fp32",
}
PACKED = {"packed": "*u8", "quantiles": "*fp32", **NESTED}
SINGLE = {**PACKED, "absmax": "*fp32"}
SIZES = dict.fromkeys(("start", "end", "last_byte"), "i64")
SHAPE = {"rows": "i32", "columns": "i32"}
FEW = {"SAMPLES": 16, "ROWS": nf4.MATMUL_ROWS, "BLOCKS": nf4.MATMUL_BLOCKS}
EIGHT = {"scales": "*fp32", "out": "*fp8e4nv", "rows": "i32", "per_row": "i32"}
TILES = {"NESTED": True, "ROWS": fp8.TILE_ROWS}
ODD = {"count"}

CASES: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "unpack bf16": (
        nf4.unpack,
        {**PACKED, **SIZES, "out": "*bf16"},
        {"NESTED": True, "BLOCKS": nf4.UNPACKED_BLOCKS},
    ),
    "unpack fp32": (
        nf4.unpack,
        {**SINGLE, **SIZES, "out": "*fp32"},
        {"NESTED": False, "BLOCKS": nf4.UNPACKED_BLOCKS},
    ),
    "few rows": (
        nf4.few_rows,
        {**PACKED, **SHAPE, "x": "*bf16", "y": "*bf16", "count": "i32"},
        {**FEW, "NESTED": True},
    ),
    "few rows fp32": (
        nf4.few_rows,
        {**SINGLE, **SHAPE, "x": "*fp32", "y": "*fp32", "count": "i32"},
        {**FEW, "NESTED": False},
    ),
    "rows to fp8": (
        fp8.quantize_row,
        {"x": "*bf16", "factors": "*fp32", "out": "*fp8e4nv", "scales": "*fp32", "columns": "i32"},
        {"FACTORS": True, "WIDTH": fp8.WIDTH},
    ),
    "row scales": (
        fp8.nf4_row_scale,
        {**NESTED, "scales": "*fp32", "per_row": "i32"},
        {"NESTED": True, "WIDTH": 256},
    ),
    "nf4 to fp8": (
        fp8.nf4_tile,
        {**PACKED, **EIGHT, "row_step": "i32"},
        {**TILES, "column_step": 1},
    ),
    "nf4 to turned fp8": (
        fp8.nf4_tile,
        {**PACKED, **EIGHT, "column_step": "i32"},
        {**TILES, "row_step": 1},
    ),
    "dense to turned fp8": (
        fp8.dense_tile,
        {**SHAPE, "w": "*bf16", "scales": "*fp32", "out": "*fp8e4nv", "column_step": "i32"},
        {"ROWS": fp8.TILE_ROWS, "row_step": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_compiles_moves_16_bytes_at_once_and_fuses_no_scale(case: str) -> None:
    kernel, arguments, constants = CASES[case]
    ptx = compiled(kernel, arguments, constants)
    if "unpack" in case or "turned" in case or case == "rows to fp8":
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx
    if case == "few rows":
        assert "mma.sync" in ptx
        assert "ld.global.b16" not in ptx
    if case != "few rows fp32":
        assert "fma.rn.f32" not in ptx


def compiled(kernel: Any, arguments: dict[str, str], constants: dict[str, Any]) -> str:
    names = kernel.arg_names
    aligned = [n for n in arguments if n not in ODD]
    source = ASTSource(
        kernel,
        {n: arguments.get(n, "constexpr") for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"enable_fp_fusion": False}
    return triton.compile(source, target=HOPPER, options=options).asm["ptx"]
