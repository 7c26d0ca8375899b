"""The C kernels against the torch code that they stand in for, at every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from inlay.errors import DataError, UsageError
from inlay.kernels import native
from inlay.kernels.epilogue import Epilogue, LowRank
from inlay.kernels.formats import dense
from inlay.kernels.native import build, reference
from inlay.storage import nf4_blocks
from inlay.storage.nf4 import NF4Linear

LEVELS = build.LEVELS[: 1 + build.LEVELS.index(native.status().split(":")[0])] if (
    native.available()
) else ()  # fmt: skip

SOURCES = (*build.KERNELS.sources, *build.MEMORY.sources)

pytestmark = pytest.mark.skipif(not LEVELS, reason=native.status())
HALVES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = (torch.float32, torch.bfloat16)


WIDE = LEVELS[3:]
"""Those that differ from avx512 in products alone, which multiply in bfloat16 arithmetic."""


@pytest.fixture(params=LEVELS[:3])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use(request.param):
        yield request.param


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_torch(make: Callable[[], Tensor | tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    with native.use("off"):
        made = make()
    return (made,) if isinstance(made, Tensor) else tuple(made)


def awkward(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Weights with zero blocks, ties, subnormals and a range of sizes."""
    w = drawn(count, seed=seed) * torch.logspace(-8, 4, count)
    w[: min(70, count // 2)] = 0.0
    w[count // 3 : count // 3 + 20] = 1e-41
    table = torch.tensor(nf4_blocks.QUANTILES)
    ties = torch.cat([table, nf4_blocks.midpoints(table)])[: max(count - 100, 0)]
    w[len(w) - len(ties) :] = ties
    return w.to(dtype)


def nf4_parts(rows: int, columns: int, double_quant: bool) -> list[Tensor]:
    layer = NF4Linear.quantized(drawn(rows, columns), None, double_quant=double_quant)
    return layer.parts()


# ---- products ----

ROWS = 560
"""How many rows the C product takes at once."""


@pytest.mark.parametrize("sizes", [
    (1, 1, 1), (1, 5, 33), (13, 33, 31), (14, 32, 32), (15, 384, 64), (29, 385, 97),
    (100, 768, 7), (ROWS, 40, 100), (ROWS + 1, 100, 40), (3 * ROWS + 5, 31, 65), (6, 1000, 500),
    (ROWS, 390, 7600),
])  # fmt: skip
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_product_with_a_bfloat16_weight(
    sizes: tuple[int, int, int], transposed: bool, threads: int
) -> None:
    m, k, n = sizes
    x, weight = drawn(m, k), drawn(*((n, k) if transposed else (k, n)), dtype=torch.bfloat16)
    held = weight.t().contiguous().t()
    with on_threads(threads):
        y = native.product(x, weight, transposed)
        assert same(y, native.product(x, held, transposed))
    assert same(y, native.product(x, weight, transposed))
    check_product(y, x, weight.t() if transposed else weight)


@pytest.mark.parametrize("sizes", [(1, 5), (14, 32), (31, 64), (100, 384), (40, 448), (450, 128)])
@pytest.mark.parametrize("m", [1, 29, ROWS + 1])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_product_with_an_nf4_weight(
    m: int, sizes: tuple[int, int], transposed: bool, double_quant: bool
) -> None:
    rows, columns = sizes
    parts = nf4_parts(rows, columns, double_quant)
    weight = dense(parts, "nf4", rows, columns, torch.float32)
    x = drawn(m, columns if transposed else rows, seed=1)
    y = native.nf4_product(x, parts, rows if transposed else columns, transposed)
    if columns % 64:
        assert y is None
    else:
        check_product(y, x, weight.t() if transposed else weight)


@pytest.mark.parametrize("sizes", [(1, 5), (14, 32), (31, 96), (100, 384), (40, 448), (450, 128)])
@pytest.mark.parametrize("m", [1, 29, ROWS + 1])
@pytest.mark.parametrize("transposed", [True, False])
def test_product_with_an_int8_weight(m: int, sizes: tuple[int, int], transposed: bool) -> None:
    q, absmax = native.int8_quantize(drawn(*sizes))
    weight = dense([q, absmax], "int8", *sizes, torch.float32)
    x = drawn(m, sizes[1] if transposed else sizes[0], seed=1)
    y = native.int8_product(x, q, absmax, transposed)
    if sizes[1] % 32:
        assert y is None
    else:
        check_product(y, x, weight.t() if transposed else weight)


@contextmanager
def on_threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def check_product(y: Tensor | None, x: Tensor, weight: Tensor) -> None:
    """Hold `y` against `x @ weight` in fp64, or against None where there is no product in C."""
    assert (y is not None) == native.multiplies()
    if y is None:
        return
    error = (y - x.double() @ weight.double()).abs()
    bound = x.abs().double() @ weight.abs().double() * x.shape[1] * torch.finfo(y.dtype).eps
    assert (error <= bound).all()


@pytest.mark.parametrize("sizes", [
    (1, 1, 1), (13, 33, 31), (14, 384, 32), (29, 385, 97), (6, 1000, 500), (ROWS + 1, 100, 40),
])  # fmt: skip
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_reads_both_in_either_dtype(
    sizes: tuple[int, int, int], transposed: bool, dtype: torch.dtype
) -> None:
    m, k, n = sizes
    shape = (n, k) if transposed else (k, n)
    for x, weight in [(drawn(m, k, dtype=dtype), drawn(*shape)),
                      (drawn(m, k, dtype=torch.bfloat16), drawn(*shape, dtype=dtype))]:  # fmt: skip
        y = native.product(x, weight, transposed)
        check_product(y, x, weight.t() if transposed else weight)


@pytest.mark.parametrize("rank", [0, 1, 16, 17, 33, 100, 400, 801])
@pytest.mark.parametrize("k", [40, 352, 368, 384, 385, 800])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_product_ends_with_a_low_rank_term_and_a_bias(
    k: int, rank: int, turned: tuple[bool, bool]
) -> None:
    m, n, scale = 31, 70, 1.7
    x, weight = drawn(m, k, dtype=torch.bfloat16), drawn(k, n, dtype=torch.bfloat16)
    left, bias = drawn(m, rank, seed=2), drawn(n, 1, seed=4).flatten()
    right = drawn(n, rank, seed=3).t() if turned[1] else drawn(rank, n, seed=3)
    stored = weight.t().contiguous() if turned[0] else weight
    term = LowRank(left, right, scale) if rank else None
    expected = x.double() @ weight.double() + scale * left.double() @ right.double() + bias
    sizes = (
        x.double().abs() @ weight.double().abs()
        + scale * left.double().abs() @ right.abs().double()
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        end = Epilogue(dtype, term, bias)
        y = native.product(x, stored, turned[0], end)
        assert (y is not None) == native.multiplies()
        if y is None:
            continue
        assert y.dtype == dtype
        bound = sizes * (k + rank) * torch.finfo(torch.float32).eps
        bound += (expected.abs() + bound) * torch.finfo(dtype).eps
        assert ((y - expected).abs() <= bound).all()
        plain = native.product(x, stored, turned[0])
        assert plain is not None
        assert torch.allclose(end.applied(plain).double(), y.double(), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("level", WIDE)
@pytest.mark.parametrize("sizes", [
    (1, 1, 1), (13, 33, 31), (14, 512, 32), (33, 513, 97), (449, 100, 40), (40, 1040, 33),
    (21, 2100, 70),
])  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1, 40, 1100])
@pytest.mark.parametrize("turned", [True, False])
def test_bfloat16_arithmetic_rounds_its_inputs_and_nothing_else(
    level: str, sizes: tuple[int, int, int], rank: int, turned: bool
) -> None:
    m, k, n = sizes
    left, bias, scale = drawn(m, rank, seed=2), drawn(n, seed=4), 1.7
    right = drawn(n, rank, seed=3).t() if turned else drawn(rank, n, seed=3)
    term = LowRank(left, right, scale) if rank else None
    for dtype in BOTH:
        x, weight = drawn(m, k, dtype=dtype), drawn(n, k, dtype=dtype, seed=1)
        stored = weight if turned else weight.t().contiguous()
        pairs = [(x, weight.t()), (scale * left, right)]
        exact = [(a.bfloat16().double(), b.bfloat16().double()) for a, b in pairs]
        expected = sum((a @ b for a, b in exact), bias.double())
        sizes_ = sum((a.abs() @ b.abs() for a, b in exact), bias.double().abs())
        with native.use(level):
            wide = native.product(x, stored, turned, Epilogue(torch.float32, term, bias),
                                  torch.bfloat16)  # fmt: skip
            half = native.product(x, stored, turned, Epilogue(torch.bfloat16, term, bias),
                                  torch.bfloat16)  # fmt: skip
        assert wide is not None
        bound = sizes_ * (k + rank + 1) * torch.finfo(torch.float32).eps
        assert ((wide - expected).abs() <= bound).all()
        assert half is not None
        assert torch.equal(half, wide.bfloat16())


@pytest.mark.parametrize("level", WIDE)
@pytest.mark.parametrize("transposed", [True, False])
def test_packed_weights_are_rounded_to_bfloat16_as_a_dense_weight_would_be(
    level: str, transposed: bool
) -> None:
    out, width = 96, 192
    x = drawn(50, width if transposed else out, dtype=torch.bfloat16)
    parts = nf4_parts(out, width, True)
    packed = dense(list(parts), "nf4", out, width, torch.float32).bfloat16()
    q, absmax = native.int8_quantize(drawn(out, width, seed=5))
    whole = (q * absmax[:, None] * (1 / 127)).bfloat16()
    with native.use(level):
        half = torch.bfloat16
        found = [
            native.nf4_product(x, parts, out if transposed else width, transposed, None, half),
            native.int8_product(x, q, absmax, transposed, None, half),
        ]
        wanted = [native.product(x, w, transposed, None, half) for w in (packed, whole)]
    for a, b in zip(found, wanted, strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, rtol=0, atol=float(b.abs().max()) * 2**-9)


@pytest.mark.parametrize("level", WIDE)
def test_a_row_of_a_bfloat16_product_depends_on_that_row_alone(level: str) -> None:
    x, weight = drawn(700, 300, dtype=torch.bfloat16), drawn(90, 300, dtype=torch.bfloat16, seed=1)
    with native.use(level):
        whole = native.product(x, weight, True, dtype=torch.bfloat16)
        assert whole is not None
        for rows in (slice(0, 1), slice(3, 20), slice(440, 700)):
            part = native.product(x[rows], weight, True, dtype=torch.bfloat16)
            assert part is not None
            assert torch.equal(part, whole[rows])
        for threads in (2, 3):
            with on_threads(threads):
                assert same(native.product(x, weight, True, dtype=torch.bfloat16), whole)


@pytest.mark.parametrize("level", WIDE)
def test_a_bfloat16_product_keeps_what_is_not_finite(level: str) -> None:
    x, weight = drawn(20, 50, dtype=torch.bfloat16), drawn(50, 40, dtype=torch.bfloat16)
    x[3, 4], weight[7, 11] = float("inf"), float("nan")
    with native.use(level):
        y = native.product(x, weight, False, Epilogue(torch.bfloat16), torch.bfloat16)
    assert y is not None
    assert y[:, 11].isnan().all()
    assert not y[3].isfinite().any()
    assert y[:3, :11].isfinite().all()


def test_bfloat16_arithmetic_is_left_to_torch_below_its_level(level: str) -> None:
    x, weight = drawn(20, 50, dtype=torch.bfloat16), drawn(50, 40, dtype=torch.bfloat16)
    assert not native.multiplies(torch.bfloat16)
    assert native.product(x, weight, False, None, torch.bfloat16) is None
    assert not native.multiplies(torch.float16)


def test_a_product_is_rounded_to_bfloat16_as_torch_rounds() -> None:
    if not native.multiplies():
        pytest.skip("no product in C with this instruction set")
    bits = torch.randint(-(2**31), 2**31, (50_000, 1), generator=torch.Generator().manual_seed(0))
    x, one = bits.to(torch.int32).view(torch.float32), torch.ones(1, 1)
    wide = native.product(x, one, transposed=False)
    half = native.product(x, one, transposed=False, epilogue=Epilogue(torch.bfloat16))
    assert wide is not None
    assert half is not None
    torch.testing.assert_close(half, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_product_refuses_a_term_that_it_cannot_read() -> None:
    x, weight = drawn(5, 40), drawn(40, 30, dtype=torch.bfloat16)
    left, right = drawn(5, 8), drawn(8, 60)[:, ::2]
    for term in [(left.double(), right.contiguous()), (left, right), (left.bfloat16(), right)]:
        assert (
            native.product(x, weight, False, Epilogue(torch.float32, LowRank(*term, 1.0))) is None
        )


def test_product_keeps_what_is_not_finite() -> None:
    if not native.multiplies():
        pytest.skip("no product in C with this instruction set")
    x, weight = drawn(20, 50), drawn(50, 40, dtype=torch.bfloat16)
    x[3, 4], weight[7, 11] = float("inf"), float("nan")
    y = native.product(x, weight, transposed=False)
    assert y is not None
    assert y[:, 11].isnan().all()
    assert not y[3].isfinite().any()
    assert y[:3, :11].isfinite().all()


def test_product_is_left_to_torch_where_c_has_none(level: str) -> None:
    x, weight = drawn(20, 50), drawn(50, 40, dtype=torch.bfloat16)
    assert (native.product(x, weight, transposed=False) is None) == (level != "avx512")
    cases = [
        (x, weight.half()), (x.double(), weight), (x.t().contiguous().t(), weight),
        (x, weight.repeat(1, 2)[:, ::2]), (x[:0], weight), (x[:, :0], weight[:0]),
    ]  # fmt: skip
    assert [native.product(*case, transposed=False) for case in cases] == [None] * len(cases)
    with native.use("off"):
        assert native.product(x, weight, transposed=False) is None


# ---- NF4 ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 127, 128, 129, 1000, 4097, 100_003])
def test_quantised_bytes_are_those_of_torch(level: str, dtype: torch.dtype, count: int) -> None:
    w = awkward(count, dtype, count)
    packed, absmax = by_torch(lambda: nf4_blocks.quantized_blocks(w))
    found = native.nf4_quantize(w)
    assert found is not None
    assert torch.equal(found[0], packed)
    assert torch.equal(found[1], absmax)


def test_every_half_is_quantised_as_torch_does(level: str) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        w = bits.view(dtype)
        w = w[torch.isfinite(w)]
        packed, absmax = by_torch(lambda w=w: nf4_blocks.quantized_blocks(w))
        found = native.nf4_quantize(w)
        assert found is not None
        assert torch.equal(found[0], packed)
        assert torch.equal(found[1], absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_absmax(level: str, bad: float) -> None:
    for place in (5, 130):
        w = drawn(140)
        w[place] = bad
        packed, absmax = by_torch(lambda w=w: nf4_blocks.quantized_blocks(w))
        found = native.nf4_quantize(w)
        assert found is not None
        assert torch.equal(found[0], packed)
        assert torch.equal(found[1].isfinite(), absmax.isfinite())


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_nested_codes_are_those_of_torch(level: str, count: int) -> None:
    absmax = drawn(count, seed=count).abs() * 0.1
    absmax[count // 2 : count // 2 + 300] = absmax.mean()
    expected = by_torch(lambda: tuple(nf4_blocks.nested(absmax).values()))
    found = tuple(nf4_blocks.nested(absmax).values())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nested_codes_of_equal_absmax_are_zero(level: str) -> None:
    absmax = torch.full((300,), 0.5)
    found = nf4_blocks.nested(absmax)
    assert not found["absmax"].any()
    assert not found["nested_absmax"].any()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("columns", [1, 3, 63, 64, 65, 200, 896])
def test_rows_are_dequantised_as_torch_does(level: str, columns: int, double_quant: bool) -> None:
    rows = 37
    parts = nf4_parts(rows, columns, double_quant)
    for dtype in BOTH:
        (whole,) = by_torch(lambda dtype=dtype: dense(parts, "nf4", rows, columns, dtype))
        for first, count in ((0, rows), (0, 1), (5, 1), (7, 11), (rows - 1, 1), (3, 0)):
            guarded = torch.full((count + 2, columns), 7.0, dtype=dtype)
            assert native.nf4_dequantize(parts, guarded[1:-1], first)
            assert torch.equal(guarded[1:-1], whole[first : first + count])
            assert bool((guarded[0] == 7).all() and (guarded[-1] == 7).all())


@settings(max_examples=30)
@given(rows=st.integers(1, 50), columns=st.integers(1, 150), first=st.integers(0, 49))
def test_any_row_range(rows: int, columns: int, first: int) -> None:
    first = min(first, rows - 1)
    parts = nf4_parts(rows, columns, True)
    (whole,) = by_torch(lambda: dense(parts, "nf4", rows, columns, torch.bfloat16))
    for level in LEVELS:
        with native.use(level):
            out = torch.empty(rows - first, columns, dtype=torch.bfloat16)
            assert native.nf4_dequantize(parts, out, first)
        assert torch.equal(out, whole[first:])


def test_other_dtypes_are_left_to_torch(level: str) -> None:
    parts = nf4_parts(8, 70, True)
    for dtype in (torch.float16, torch.float64):
        out = torch.empty(8, 70, dtype=dtype)
        assert not native.nf4_dequantize(parts, out, 0)
        nf4_blocks.dequantized(parts, out, 0)
        assert torch.equal(out, dense(parts, "nf4", 8, 70, torch.float32).to(dtype))
    assert native.nf4_quantize(drawn(64).double()) is None


@pytest.mark.parametrize("columns", [1, 50, 64, 100, 192])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_to_int8_rounds_the_dense_rows(level: str, columns: int, double_quant: bool) -> None:
    rows, first = 30, 4
    parts = nf4_parts(rows, columns, double_quant)
    whole = dense(parts, "nf4", rows, columns, torch.float32)[first:]
    scales = nf4_blocks.block_scales(parts[1:]).abs()
    touched = [scales[i * columns // 64 : -(-(i + 1) * columns // 64)] for i in range(first, rows)]
    largest = torch.stack([s.amax() for s in touched])
    q = torch.empty(rows - first, columns, dtype=torch.int8)
    scale = torch.empty(rows - first)
    assert native.nf4_to_int8(parts, q, scale, first)
    assert torch.equal(scale, largest / 127)
    steps = torch.where(largest > 0, largest.reciprocal() * 127.0, 0.0)
    assert torch.equal(q, torch.round(whole * steps[:, None]).to(torch.int8))


# ---- int8 ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 511), (7, 512), (3, 513), (40, 1500)])
def test_int8_rows_are_those_of_torch(
    level: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = drawn(*shape, dtype=dtype)
    x[0] = 0
    x[-1, 0] = 1e-42
    q, absmax = by_torch(lambda: native.int8_quantize(x))
    found_q, found_absmax = native.int8_quantize(x)
    assert torch.equal(found_q, q)
    assert torch.equal(found_absmax, absmax)
    for out in BOTH:
        here, there = torch.empty(shape, dtype=out), torch.empty(shape, dtype=out)
        native.int8_dequantize(q, absmax, here)
        with native.use("off"):
            native.int8_dequantize(q, absmax, there)
        assert torch.equal(here, there)


def test_int8_product_is_near_the_product(level: str) -> None:
    x, w = drawn(33, 700), drawn(45, 700, seed=1)
    (qx, sx), (qw, sw) = native.int8_quantize(x), native.int8_quantize(w)
    sums = qx.int() @ qw.int().T
    y, bf = torch.empty(33, 45), torch.empty(33, 45, dtype=torch.bfloat16)
    native.int8_rescale(sums, sx / 127, sw / 127, y)
    native.int8_rescale(sums, sx / 127, sw / 127, bf)
    assert torch.equal(y, sums * (sx / 127)[:, None] * (sw / 127))
    assert torch.equal(bf, y.bfloat16())
    assert (y - x @ w.T).norm() / (x @ w.T).norm() < 0.02


@pytest.mark.parametrize("dtype", BOTH)
def test_int8_sums_are_rescaled_by_the_library_into_some_columns(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = torch.randint(-(1 << 20), 1 << 20, (33, 700), dtype=torch.int32)
    rows, columns = drawn(33).abs(), drawn(700, seed=1).abs()
    wide, wanted = torch.zeros(33, 1000, dtype=dtype), torch.zeros(33, 1000, dtype=dtype)
    wanted[:, 200:900] = sums * rows[:, None] * columns
    calls, call = [], native.called
    monkeypatch.setattr(native, "called", lambda *each: (calls.append(each[0]), call(*each))[1])
    native.int8_rescale(sums, rows, columns, wide[:, 200:900])
    assert torch.equal(wide, wanted)
    assert calls == ["inlay_int8_rescale"]


# ---- the loss ----


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 17), (5, 512), (40, 5001)])
def test_loss_equals_autograd_in_fp64(level: str, rows: int, vocabulary: int) -> None:
    logits = drawn(rows, vocabulary) * 8
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    labels[0] = int(logits[0].argmax())
    exact = logits.double().requires_grad_()
    log_p = exact.log_softmax(1)
    at_label = log_p.gather(1, labels[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(at_label.sum(), exact)
    entropy = -(log_p.exp() * log_p).sum(1)
    found_log_p, found_entropy, top1 = native.loss_tile(logits, labels)
    assert torch.allclose(found_log_p.double(), at_label, rtol=1e-6, atol=2e-6)
    assert torch.allclose(found_entropy.double(), entropy, rtol=1e-5, atol=2e-6)
    assert torch.allclose(logits.double(), gradient, rtol=2e-6, atol=2e-7)
    assert torch.equal(top1, exact.argmax(1) == labels)


def test_loss_in_c_equals_loss_in_torch(level: str) -> None:
    here, labels = drawn(9, 300) * 5, torch.arange(9)
    there = here.clone()
    found = native.loss_tile(here, labels)
    expected = reference.loss_tile(there, labels)
    for a, b in zip((*found[:2], here), (*expected[:2], there), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[2], expected[2])


def test_loss_with_extreme_logits(level: str) -> None:
    logits = torch.tensor([[0.0, -1e30, float("-inf"), 3.0], [1e30, 0.0, 5.0, 5.0]])
    log_p, entropy, top1 = native.loss_tile(logits, torch.tensor([3, 0]))
    assert torch.allclose(log_p, torch.tensor([-0.04858735, 0.0]))
    assert torch.isfinite(entropy).all()
    assert top1.tolist() == [True, True]
    assert torch.isfinite(logits).all()
    for bad in (float("nan"), float("inf")):
        spoilt = torch.zeros(2, 40)
        spoilt[0, 7] = bad
        log_p, _, _ = native.loss_tile(spoilt, torch.tensor([1, 1]))
        assert torch.isnan(log_p[0])
        assert torch.isfinite(log_p[1])


@pytest.mark.parametrize("wrong", [-100, -1, 50])
def test_a_label_outside_the_vocabulary_is_an_error(wrong: int) -> None:
    for level in ("off", *LEVELS):
        logits = drawn(3, 50)
        with native.use(level), pytest.raises(DataError, match=f"label {wrong} is outside"):
            native.loss_tile(logits, torch.tensor([0, 1, wrong]))
        assert torch.equal(logits, drawn(3, 50))


# ---- RMSNorm, the gate ----


def closeness(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 8e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}


def differing(found: Tensor, expected: Tensor) -> float:
    """The share of entries whose bits differ."""
    return float((found != expected).float().mean())


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 64), (7, 513), (2, 3, 896), (4, 2500)])
def test_norm_is_that_of_llama(level: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module = LlamaRMSNorm(shape[-1], eps=1e-5)
    module.weight = nn.Parameter(1 + 0.3 * drawn(shape[-1], seed=2), requires_grad=False)
    module.to(dtype)
    x = (drawn(*shape) * 3).to(dtype).requires_grad_()
    y = module(x)
    g = drawn(*shape, dtype=dtype, seed=3)
    (gx,) = torch.autograd.grad(y, x, g)
    found, rstd = native.rms_norm(x.detach(), module.weight.detach(), 1e-5)
    assert rstd.shape == shape[:-1]
    assert torch.allclose(found, y, **closeness(dtype))
    back = native.rms_norm_backward(g, x.detach(), module.weight.detach(), rstd)
    assert torch.allclose(back, gx, **closeness(dtype))
    if dtype == torch.bfloat16:
        assert differing(found, y) < 0.005
        assert differing(back, gx) < 0.02


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(1,), (511,), (3, 513), (4, 4864)])
def test_gate_is_that_of_transformers(
    level: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    gate = (drawn(*shape) * 4).to(dtype).requires_grad_()
    up = drawn(*shape, dtype=dtype, seed=1).requires_grad_()
    g = drawn(*shape, dtype=dtype, seed=2)
    h = nn.functional.silu(gate) * up
    expected = (*torch.autograd.grad(h, (gate, up), g), h.detach())
    plain = (gate.detach(), up.detach())
    found = native.silu_gate_backward(g, *plain)
    assert torch.equal(native.silu_gate(*plain), found[2])
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, **closeness(dtype))
        assert dtype == torch.float32 or differing(a, b) < 0.005
    spare = (gate.detach().clone(), up.detach().clone())
    written = native.silu_gate_backward(g_ := g.clone(), *spare, out=(spare[0], spare[1], g_))
    assert written[0].data_ptr() == spare[0].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(written, found, strict=True))


def test_gate_far_from_zero(level: str) -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, 90.0, 200.0, 1e30])
    one = torch.ones(6)
    g_gate, g_up, h = native.silu_gate_backward(one, gate, one)
    assert torch.allclose(h, torch.tensor([0, 0, 0, 90.0, 200.0, 1e30]), atol=1e-6)
    assert torch.allclose(g_gate, torch.tensor([0.0, 0, 0, 1, 1, 1]), atol=1e-6)
    assert torch.equal(g_up, h)
    assert torch.isnan(native.silu_gate(torch.full((1,), float("nan")), torch.ones(1))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_go_through_torch(level: str, dtype: torch.dtype) -> None:
    x, w = drawn(4, 20, dtype=dtype), drawn(20, dtype=dtype, seed=1)
    y, rstd = native.rms_norm(x, w, 1e-6)
    assert y.dtype == dtype
    assert rstd.dtype == torch.float32
    assert native.rms_norm_backward(x, x, w, rstd).dtype == dtype
    h = native.silu_gate(x, x)
    assert all(t.dtype == dtype for t in native.silu_gate_backward(h, x, x))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_values_do_not_depend_on_threads(level: str, threads: int) -> None:
    before = torch.get_num_threads()
    x, w, labels = drawn(300, 896), drawn(896, seed=1), torch.arange(300)
    expected = (native.rms_norm(x, w, 1e-6)[0], *native.loss_tile(x.clone(), labels)[:2])
    try:
        torch.set_num_threads(threads)
        found = (native.rms_norm(x, w, 1e-6)[0], *native.loss_tile(x.clone(), labels)[:2])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- building ----


def run(code: str, cache: Path, **env: str) -> subprocess.Popen[str]:
    full = {**os.environ, "XDG_CACHE_HOME": str(cache), **env}
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=full, stdout=pipe, stderr=pipe, text=True)


ONE_RUNTIME = """
import torch
from pathlib import Path
from inlay.kernels import native
native.rms_norm(torch.randn(300, 896), torch.randn(896), 1e-6)
maps = Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[4] for line in maps if "libgomp" in line or "libiomp" in line}))
print(native.status())
"""


def printed(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert not err
    return out.strip()


SHOW = "from inlay.kernels import native; print(native.status())"


def test_one_openmp_runtime_is_loaded(tmp_path: Path) -> None:
    runtimes, status = printed(run(ONE_RUNTIME, tmp_path)).splitlines()
    assert runtimes == "1"
    assert "threads of" in status


def test_racing_processes_build_one_library(tmp_path: Path) -> None:
    racing = [run(SHOW, tmp_path) for _ in range(2)]
    states = {printed(process) for process in racing}
    assert len(states) == 1
    assert not states.pop().startswith("off")
    assert len(list((tmp_path / "inlay" / "native").iterdir())) == 1


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"INLAY_NATIVE": "0"}, "off: switched off by INLAY_NATIVE=0"),
        ({"PATH": "/nowhere", "CC": ""}, "off: no C compiler"),
        ({"CC": "false"}, "off: "),
        ({"XDG_CACHE_HOME": "/dev/null"}, "off: "),
    ],
)
def test_without_a_library_torch_does_the_work(
    tmp_path: Path, env: dict[str, str], said: str
) -> None:
    code = f"""{SHOW}
import torch
from inlay.storage.nf4 import NF4Linear
layer = NF4Linear.quantized(torch.ones(3, 70), None)
print(native.available(), float(layer.dequantize().sum()))"""
    state, work = printed(run(code, tmp_path, **env)).splitlines()
    assert state.startswith(said)
    assert work == "False 210.0"


@pytest.mark.parametrize("asked", LEVELS)
def test_the_environment_bounds_the_instruction_set(tmp_path: Path, asked: str) -> None:
    cache = build.cache_folder().parents[1]
    assert printed(run(SHOW, cache, INLAY_NATIVE=asked)).startswith(f"{asked}:")


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(UsageError, match="native level 'sse9' is none of off, generic"):
        native.use("sse9").__enter__()


def test_quantiles_are_those_of_the_storage() -> None:
    source = (Path(build.__file__).parent / build.KERNELS.sources[0]).read_text()
    table = source.split("QUANTILES[16] = {")[1].split("}")[0]
    assert [float(x.strip(" f\n")) for x in table.split(",") if x.strip()] == list(
        nf4_blocks.QUANTILES
    )


def test_sources_are_in_the_package() -> None:
    patterns = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert all(f"kernels/native/*{Path(name).suffix}" in patterns for name in SOURCES)


def test_memory_is_kept_and_given_back() -> None:
    code = """
import resource, torch
from inlay.kernels import native
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
resident = lambda: int(open("/proc/self/statm").read().split()[1])
before, fresh = faults(), resident()
assert native.keep_memory() is None
kept, high = min(faults() for _ in range(5)), resident()
assert native.release_memory() is None
print(before > 10 * kept, high > fresh + 10000, resident() < fresh + 5000)"""
    process = run(code, build.cache_folder().parents[1])
    assert printed(process) == "True True True"


def test_shapes_that_do_not_fit_never_reach_c(level: str) -> None:
    parts = nf4_parts(4, 64, True)
    assert not native.nf4_dequantize(parts, torch.empty(4, 64), 1)
    assert not native.nf4_dequantize([parts[0], parts[1][:2], *parts[2:]], torch.empty(4, 64), 0)
    with pytest.raises(RuntimeError, match="size"):
        native.rms_norm(drawn(3, 64), drawn(32), 1e-6)
    with pytest.raises(RuntimeError, match="size"):
        native.silu_gate(drawn(64), drawn(32))
