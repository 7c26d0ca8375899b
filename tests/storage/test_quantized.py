"""Every packed storage: products, gradients, what is saved for backward, moves, files."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inlay.errors import StorageError
from inlay.storage.quantized import QuantizedLinear
from inlay.storage.registry import STORAGES

CASES = [("nf4", True), ("nf4", False), ("int8", True)]
every = pytest.mark.parametrize(("storage", "double_quant"), CASES)


def layer_of(
    storage: str, double_quant: bool, rows: int, columns: int, dtype: torch.dtype, bias: bool = True
) -> QuantizedLinear:
    drawn = torch.Generator().manual_seed(rows * 1000 + columns)
    w = torch.randn(rows, columns, generator=drawn).to(dtype)
    b = torch.randn(rows, generator=drawn).to(dtype) if bias else None
    return STORAGES[storage].quantized(w, b, double_quant=double_quant)


@every
@settings(max_examples=25)
@given(rows=st.integers(1, 90), columns=st.integers(1, 140), lead=st.lists(st.integers(0, 3)))
def test_products_and_gradient_equal_dense(
    storage: str, double_quant: bool, rows: int, columns: int, lead: list[int]
) -> None:
    lead = lead[:3]
    layer = layer_of(storage, double_quant, rows, columns, torch.float64)
    dense = layer.dequantize()
    x = torch.randn(*lead, columns, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert torch.allclose(y, x @ dense.T + layer.bias, atol=1e-10)
    g = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, g)
    assert torch.allclose(found, g @ dense, atol=1e-10)
    assert torch.allclose(layer.matmul_t(g), g @ dense, atol=1e-10)
    assert torch.allclose(layer.matmul(x), x @ dense.T, atol=1e-10)


@every
def test_gradient_check_in_fp64(storage: str, double_quant: bool) -> None:
    layer = layer_of(storage, double_quant, 5, 7, torch.float64)
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))
    assert torch.autograd.gradcheck(layer.matmul_t, (torch.randn_like(layer(x)).requires_grad_(),))


@every
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_rows_are_rows_of_the_whole(storage: str, double_quant: bool, columns: int) -> None:
    layer = layer_of(storage, double_quant, 37, columns, torch.bfloat16)
    dense = layer.dequantize()
    picked = torch.tensor([3, 36, 0, 3])
    assert torch.equal(layer.dequantize(picked), dense[picked])
    assert torch.equal(layer.dequantize(slice(2, 30, 5)), dense[2:30:5])


@every
def test_several_chunks_are_one_matrix(
    storage: str, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = layer_of(storage, double_quant, 50, 77, torch.float32)
    monkeypatch.setattr("inlay.storage.quantized.CHUNK", 256)
    pieces = layer_of(storage, double_quant, 50, 77, torch.float32)
    assert torch.equal(whole.packed_weight, pieces.packed_weight)
    monkeypatch.undo()
    expected = whole.dequantize()
    monkeypatch.setattr("inlay.storage.quantized.CHUNK", 256)
    assert torch.equal(pieces.dequantize(), expected)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, beyond x itself."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    y.sum().backward()
    return sum(kept.values())


@every
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_backward_keeps_no_dense_weight(
    storage: str, double_quant: bool, backend: str | None
) -> None:
    torch.compiler.reset()
    layer = layer_of(storage, double_quant, 256, 320, torch.float32)
    run = torch.compile(layer, fullgraph=True, backend=backend) if backend else layer
    x = torch.randn(4, 320, requires_grad=True)
    packed = sum(t.nbytes for t in layer.parts())
    assert saved_bytes(run, x) <= packed + layer.bias.nbytes
    assert packed < 256 * 320 * 4 / 3
    dense = nn.Linear(320, 256)
    dense.weight.data = layer.dequantize()
    assert torch.allclose(x.grad, torch.ones(4, 256) @ dense.weight, atol=1e-4)


def test_the_check_sees_a_dense_weight() -> None:
    frozen = nn.Linear(320, 256).requires_grad_(False)
    assert saved_bytes(frozen, torch.randn(4, 320, requires_grad=True)) >= 256 * 320 * 4


@every
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(storage: str, double_quant: bool, backend: str) -> None:
    torch.compiler.reset()
    stack = nn.Sequential(
        layer_of(storage, double_quant, 48, 33, torch.float32),
        nn.GELU(),
        layer_of(storage, double_quant, 20, 48, torch.float32, bias=False),
    )
    compiled = torch.compile(stack, fullgraph=True, backend=backend)
    x = torch.randn(3, 33, requires_grad=True)
    y, z = stack(x), compiled(x)
    assert torch.allclose(y, z, atol=1e-5)
    expected, found = torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(z.sum(), x)[0]
    assert torch.allclose(expected, found, atol=1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_changes_the_products_not_the_bytes(
    storage: str, double_quant: bool, dtype: torch.dtype
) -> None:
    layer = layer_of(storage, double_quant, 33, 70, torch.float32)
    before = {name: t.clone() for name, t in layer.held().items()}
    model = nn.Sequential(layer).to(dtype)
    assert model[0] is layer
    assert layer.dtype == layer.dequantize().dtype == layer.bias.dtype == dtype
    for name, tensor in layer.held().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert layer(torch.randn(2, 70, dtype=dtype)).dtype == dtype


@every
def test_half_and_bfloat16_methods(storage: str, double_quant: bool) -> None:
    layer = layer_of(storage, double_quant, 33, 70, torch.float32)
    expected = layer.dequantize()
    assert torch.equal(layer.bfloat16().dequantize(), expected.bfloat16())
    assert torch.equal(layer.half().dequantize(), expected.half())
    assert torch.equal(layer.float().dequantize(), expected)
    with pytest.raises(StorageError, match=r"cannot be cast to torch\.int64"):
        layer.type(torch.int64)


@every
def test_a_move_takes_everything(storage: str, double_quant: bool) -> None:
    layer = layer_of(storage, double_quant, 33, 70, torch.float32).to("meta")
    assert layer.device.type == "meta"
    assert {t.device.type for t in (*layer.held().values(), layer.bias)} == {"meta"}


@every
def test_state_dict_round_trip_is_bit_equal(storage: str, double_quant: bool) -> None:
    model = nn.Sequential(layer_of(storage, double_quant, 33, 70, torch.bfloat16), nn.ReLU())
    other = nn.Sequential(
        STORAGES[storage].quantized(torch.randn(33, 70), torch.zeros(33)), nn.ReLU()
    )
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not other.load_state_dict(saved).missing_keys
    assert other.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.state_dict().items())
    if storage == "nf4":
        assert other[0].dtype == torch.bfloat16
    other[0].to(torch.bfloat16)
    assert torch.equal(other[0].dequantize(), model[0].dequantize())


@every
def test_a_file_that_does_not_fit_is_refused(storage: str, double_quant: bool) -> None:
    layer = layer_of(storage, double_quant, 33, 70, torch.float32)
    before = layer.dequantize()
    saved = layer.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": saved["bias"]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**saved, "surplus": torch.zeros(1)})
    other = layer_of(storage, double_quant, 34, 70, torch.float32).state_dict()
    with pytest.raises(RuntimeError, match=r"shape \(34, 70\) with a bias"):
        layer.load_state_dict(other)
    with pytest.raises(RuntimeError, match="without a bias"):
        layer.load_state_dict({k: v for k, v in saved.items() if k != "bias"})
    assert torch.equal(layer.dequantize(), before)


def test_damaged_nf4_is_refused() -> None:
    layer = layer_of("nf4", True, 33, 70, torch.float32)
    saved = layer.state_dict()
    state = "weight.quant_state.bitsandbytes__nf4"
    for name, value, said in [
        (state, torch.zeros(4, dtype=torch.uint8), "is damaged"),
        (state, None, "says the shape"),
        ("weight.absmax", saved["weight.absmax"][:-1], "do not fit"),
        ("weight.nested_absmax", None, "do not fit"),
        ("weight.absmax", saved["weight.absmax"].float(), "quantised itself"),
        ("weight", saved["weight"][:-1], "do not fit"),
        ("weight.quant_map", torch.zeros(16), "sixteen values"),
    ]:
        broken = {**saved, name: value}
        if value is None:
            del broken[name]
        with pytest.raises(StorageError, match=said):
            type(layer).restored(broken)
    text = bytes(saved[state].tolist()).decode()
    for old, new in [('"nf4"', '"fp4"'), ('"blocksize": 64', '"blocksize": 128'), ("float32", "x")]:
        changed = torch.tensor(list(text.replace(old, new).encode()), dtype=torch.uint8)
        with pytest.raises(StorageError, match=r"NF4|nf4"):
            type(layer).restored({**saved, state: changed})


def test_damaged_int8_is_refused() -> None:
    saved = layer_of("int8", True, 5, 7, torch.float32).state_dict()
    for name, value in [
        ("weight", saved["weight"].float()),
        ("SCB", saved["SCB"][:-1]),
        ("weight_format", torch.tensor(2, dtype=torch.uint8)),
    ]:
        with pytest.raises(StorageError):
            STORAGES["int8"].restored({**saved, name: value})


@every
def test_deepcopy_and_requantized(storage: str, double_quant: bool) -> None:
    layer = layer_of(storage, double_quant, 33, 70, torch.bfloat16)
    twin = copy.deepcopy(layer)
    twin.packed_weight.data.zero_()
    assert layer.packed_weight.any()
    w = torch.randn(33, 70)
    again = layer.requantized(w, layer.bias)
    assert type(again) is type(layer)
    assert (again.dtype, again.options()) == (layer.dtype, layer.options())
    assert (again.dequantize() - w).norm() < 0.12 * w.norm()
    assert not any(p.requires_grad for p in again.parameters())


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(
    storage: str, double_quant: bool, value: float
) -> None:
    w = torch.randn(9, 70)
    w[8, 69] = value
    with pytest.raises(StorageError, match="NaN, an infinity"):
        STORAGES[storage].quantized(w, None, double_quant=double_quant)


@every
@pytest.mark.parametrize("w", [torch.zeros(3), torch.zeros(3, 3).int(), torch.zeros(0, 4)])
def test_what_is_no_matrix_is_refused(storage: str, double_quant: bool, w: Tensor) -> None:
    with pytest.raises(StorageError, match=r"holds floating-point matrices \(out, in\)"):
        STORAGES[storage].quantized(w, None, double_quant=double_quant)


@every
@pytest.mark.parametrize("scale", [1e-44, 1e-37, 1e-3, 1e35])
def test_zero_rows_and_huge_values(storage: str, double_quant: bool, scale: float) -> None:
    w = torch.randn(12, 128) * scale
    w[3] = 0.0
    dense = STORAGES[storage].quantized(w, None, double_quant=double_quant).dequantize()
    assert torch.isfinite(dense).all()
    limit = 1.2 * w.abs().max()
    assert (dense - w).abs().max() <= limit
    if not double_quant or storage == "int8":
        assert not dense[3].any()


@pytest.mark.parametrize(("storage", "double_quant"), [("nf4", True), ("int8", True)])
def test_values_whose_products_overflow_are_refused(storage: str, double_quant: bool) -> None:
    with pytest.raises(StorageError, match="values too large"):
        STORAGES[storage].quantized(torch.full((12, 128), 3e37), None, double_quant=double_quant)


@every
def test_wrong_input_is_refused(storage: str, double_quant: bool) -> None:
    layer = layer_of(storage, double_quant, 5, 7, torch.float32)
    with pytest.raises(StorageError, match="width 7"):
        layer(torch.zeros(2, 6))
    with pytest.raises(StorageError, match=r"torch\.int64"):
        layer(torch.zeros(2, 7, dtype=torch.int64))


@pytest.mark.parametrize(("storage", "double_quant", "limit"), [
    ("nf4", True, 0.095), ("nf4", False, 0.095), ("int8", True, 0.01),
])  # fmt: skip
def test_error_on_gaussian_weights(storage: str, double_quant: bool, limit: float) -> None:
    w = torch.randn(256, 320, generator=torch.Generator().manual_seed(0))
    dense = STORAGES[storage].quantized(w, None, double_quant=double_quant).dequantize()
    assert (dense - w).norm() / w.norm() < limit


@pytest.mark.parametrize(("storage", "double_quant", "bits"), [
    ("nf4", True, 4.13), ("nf4", False, 4.5), ("int8", True, 8.04),
])  # fmt: skip
def test_bits_a_weight(storage: str, double_quant: bool, bits: float) -> None:
    layer = layer_of(storage, double_quant, 1024, 1024, torch.bfloat16, bias=False)
    stored = sum(t.nbytes for name, t in layer.held().items() if "map" not in name)
    assert stored * 8 / 1024**2 <= bits
