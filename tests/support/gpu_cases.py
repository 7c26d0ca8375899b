"""What the Triton kernels compute: run by test_kernels_gpu, interpreted or on a GPU."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.runtime.interpreter as interpreter
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from triton import language as tl

from inlay.kernels.gpu import fp8, liger, nf4
from inlay.kernels.switches import plain
from inlay.storage.nf4 import NF4Linear
from inlay.storage.nf4_blocks import block_scales, quantiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
needs_liger = pytest.mark.skipif(
    INTERPRETED or find_spec("liger_kernel") is None,
    reason="Liger's kernels take plain floats, which the interpreter does not, or it is not there",
)
ROUNDED = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}


@pytest.fixture(autouse=INTERPRETED)
def as_the_hardware_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round casts to nearest even and multiply bf16 as numbers; the interpreter does neither."""
    plain = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target not in ROUNDED:
            return plain(data, source, target, mode)
        rounded = torch.from_numpy(np.array(data, np.float32)).to(ROUNDED[target])
        size = torch.uint16 if target == tl.bfloat16 else torch.uint8
        return rounded.view(size).numpy()

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        product = np.matmul(as_numbers(a), as_numbers(b)) + d.data
        return interpreter.TensorHandle(product, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def as_numbers(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data.astype(np.float32)
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def packed(rows: int, columns: int, double: bool, seed: int = 0) -> NF4Linear:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w[0, : min(columns, 3)] = torch.tensor([0.0, 40.0, -1e-5])[: min(columns, 3)]
    return NF4Linear.quantized(w, None, double_quant=double).to(DEVICE)


def dense(layer: NF4Linear, dtype: torch.dtype) -> Tensor:
    """The pure-torch values, read element by element on the CPU."""
    cpu = NF4Linear.restored(layer.cpu().serialized())
    layer.to(DEVICE)
    return cpu.float().dequantized_rows(torch.arange(layer.out_features)).to(dtype)


SHAPES = [(1, 1), (3, 5), (7, 63), (5, 64), (9, 65), (33, 100), (64, 192), (2, 20000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_gives_the_pure_torch_bytes(
    shape: tuple[int, int], dtype: torch.dtype, double: bool
) -> None:
    layer = packed(*shape, double)
    out = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    nf4.dequantize(layer.parts(), quantiles(DEVICE), out, 0)
    assert torch.equal(out.cpu(), dense(layer, dtype))


@pytest.mark.parametrize("columns", [1, 5, 63, 64, 96, 130])
@pytest.mark.parametrize("first", [0, 1, 2, 13])
def test_a_row_range_is_those_rows_and_nothing_else(columns: int, first: int) -> None:
    layer = packed(17, columns, double=True)
    whole = torch.full((6, columns), 7.0, device=DEVICE)
    nf4.dequantize(layer.parts(), quantiles(DEVICE), whole[1:4], first)
    assert torch.equal(whole[1:4].cpu(), dense(layer, torch.float32)[first : first + 3])
    assert bool((whole[[0, 4, 5]] == 7).all())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (17, 128), (40, 320)])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_few_rows_multiply_to_rounding(
    count: int, shape: tuple[int, int], dtype: torch.dtype, double: bool
) -> None:
    layer = packed(*shape, double)
    x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    y = nf4.matmul(x.to(DEVICE), layer.parts(), quantiles(DEVICE), shape[0]).cpu()
    w = dense(layer, torch.float32).to(dtype)
    oracle = x.double() @ w.double().T
    scale = x.double().abs() @ w.double().abs().T
    assert y.dtype == dtype
    bound = scale * 2**-20 + oracle.abs() * torch.finfo(dtype).eps / 2
    assert bool(((y - oracle).abs() <= bound).all())


def test_which_products_are_taken() -> None:
    assert nf4.multiplies(torch.empty(16, 128))
    assert not nf4.multiplies(torch.empty(17, 128))
    assert not nf4.multiplies(torch.empty(0, 128))
    assert not nf4.multiplies(torch.empty(4, 100))
    assert not nf4.multiplies(torch.empty(4, 128, dtype=torch.float64))


def scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The pure-torch FP8 rows and scales."""
    largest = x.float().abs().amax(1, keepdim=True)
    safe = torch.where(largest < 1e-30, 1e-30, largest)
    return (x.float() * torch.full_like(safe, 448).div(safe)).to(torch.float8_e4m3fn), safe * (
        1 / 448
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (4, 5000)])
def test_rows_become_fp8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype) * 100
    x[-1] = 0 if shape[0] > 1 else x[-1]
    factors = torch.rand(shape[1], generator=torch.Generator().manual_seed(3))
    for fold in (None, factors):
        eight, scales = fp8.quantize_rows(x.to(DEVICE), None if fold is None else fold.to(DEVICE))
        expected, expected_scales = scaled_rows(x if fold is None else x.float() * fold)
        assert torch.equal(eight.cpu().view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales.cpu(), expected_scales)


def test_a_nan_stays_a_nan() -> None:
    x = torch.ones(2, 64)
    x[1, 7] = torch.nan
    eight, _ = fp8.quantize_rows(x.to(DEVICE))
    assert eight.float().isnan().sum() == 1


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (70, 192)])
def test_an_nf4_weight_becomes_fp8_in_both_orders(shape: tuple[int, int], double: bool) -> None:
    layer = packed(*shape, double)
    w = dense(layer, torch.float32)
    parts = [p.cpu() for p in layer.parts()]
    blocks = block_scales(parts[1:]).view(shape[0], -1)
    expected_scales = blocks.abs().amax(1, keepdim=True) * (1 / 448)
    expected = (w * (1.0 / expected_scales)).to(torch.float8_e4m3fn).view(torch.uint8)
    straight = torch.empty(shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    turned = torch.empty(shape[::-1], dtype=torch.float8_e4m3fn, device=DEVICE).t()
    scales = fp8.nf4_weight(layer.parts(), quantiles(DEVICE), straight)
    fp8.nf4_weight(layer.parts(), quantiles(DEVICE), turned)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(straight.cpu().view(torch.uint8), expected)
    assert torch.equal(turned.cpu().view(torch.uint8), expected)


def test_a_dense_weight_becomes_fp8_in_both_orders() -> None:
    w = torch.randn(70, 100, generator=torch.Generator().manual_seed(4)).bfloat16()
    straight = torch.empty(70, 100, dtype=torch.float8_e4m3fn, device=DEVICE)
    turned = torch.empty(100, 70, dtype=torch.float8_e4m3fn, device=DEVICE).t()
    scales = fp8.dense_weight(w.to(DEVICE), straight)
    fp8.dense_weight(w.to(DEVICE), turned)
    expected = (w.float() * (1.0 / scales.cpu())).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(straight.cpu().view(torch.uint8), expected)
    assert torch.equal(turned.cpu().view(torch.uint8), expected)


@pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 products"
)
def test_fp8_products_in_both_directions_are_close() -> None:
    """Each e4m3 factor is off by 2**-4 at most, some 2.6% in the mean: two give under 5%."""
    layer = packed(64, 128, double=True)
    w = dense(layer, torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(32, 128, generator=generator).bfloat16()
    g = torch.randn(32, 64, generator=generator).bfloat16()
    y, back = x.float() @ w.float().T, g.float() @ w.float()
    for parts in (layer.parts(), [w.to(DEVICE)]):
        eight = fp8.times(x.to(DEVICE), parts, quantiles(DEVICE), 64).cpu()
        eight_back = fp8.times_t(g.to(DEVICE), parts, quantiles(DEVICE), 128).cpu()
        assert eight.dtype == x.dtype
        assert (eight.float() - y).norm() <= 0.05 * y.norm()
        assert (eight_back.float() - back).norm() <= 0.05 * back.norm()


@pytest.mark.skipif(INTERPRETED, reason="a CPU never takes these paths by itself")
@pytest.mark.parametrize("count", [3, 40])
def test_the_layer_takes_these_kernels(count: int) -> None:
    layer = packed(96, 128, double=True)
    x = torch.randn(count, 128, device=DEVICE, dtype=torch.bfloat16)
    w = layer.dequantize()
    with plain("triton"):
        assert torch.equal(layer.dequantize(), w)
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=2**-7)


@needs_liger
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_ligers_gates_are_what_transformers_computes(act: str) -> None:
    generator = torch.Generator().manual_seed(6)
    gate, up, g = (torch.randn(5, 48, generator=generator).to(DEVICE) for _ in range(3))
    plain_act = F.silu if act == "silu" else partial(F.gelu, approximate="tanh")
    one, two = gate.clone().requires_grad_(), up.clone().requires_grad_()
    expected = plain_act(one) * two
    expected.backward(g)
    three, four = gate.clone().requires_grad_(), up.clone().requires_grad_()
    found = liger.gated(three * 1, four * 1, act)
    found.backward(g)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(three.grad, one.grad)
    torch.testing.assert_close(four.grad, two.grad)


@needs_liger
def test_ligers_norm_is_what_transformers_computes() -> None:
    generator = torch.Generator().manual_seed(7)
    x, g = (torch.randn(5, 48, generator=generator).to(DEVICE) for _ in range(2))
    norm = LlamaRMSNorm(48, eps=1e-6).to(DEVICE).requires_grad_(False)
    norm.weight.normal_()
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm(one).backward(g)
    found = liger.rms_norm(two, norm.weight, 1e-6)
    found.backward(g)
    torch.testing.assert_close(found, norm(x))
    torch.testing.assert_close(two.grad, one.grad)
