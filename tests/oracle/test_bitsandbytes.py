"""NF4 and int8 against bitsandbytes itself: the same bytes, in both directions.

bitsandbytes' own 4-bit dequantisation is wrong on CPU where the width is no multiple of its
block (its AVX512 path restarts the blocks on each row), so values are compared with its
reference implementation in `backends/default`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from inlay.kernels import scratch
from inlay.kernels.formats import dense
from inlay.model.load.folder import EMBEDDED
from inlay.model.load.pretrained import load
from inlay.model.load.quantize import quantize
from inlay.storage.bitsandbytes import ForeignLinear
from inlay.storage.int8 import Int8Linear
from inlay.storage.nf4 import NF4Linear
from inlay.storage.registry import frozen, kind

bnb = pytest.importorskip("bitsandbytes")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(shape: tuple[int, int], seed: int, scale: float, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    drawn[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.1] = 0.0
    return drawn.to(dtype)


def reference_values(packed: Tensor, state: object) -> Tensor:
    """bitsandbytes' plain PyTorch dequantisation, without its torch.compile wrapper."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    plain = _dequantize_4bit_compute.__wrapped__
    return plain(packed.reshape(-1), absmax, state.code, 64, state.shape, state.dtype)


@settings(max_examples=150)
@given(
    rows=st.integers(1, 130),
    columns=st.integers(1, 300),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-4, 0.02, 1.0, 300.0]),
    dtype=st.sampled_from(DTYPES),
    double_quant=st.booleans(),
)
def test_same_bytes_and_values(
    rows: int, columns: int, seed: int, scale: float, dtype: torch.dtype, double_quant: bool
) -> None:
    w = weight((rows, columns), seed, scale, dtype)
    packed, state = bnb.functional.quantize_4bit(
        w.clone(), compress_statistics=double_quant, quant_type="nf4"
    )
    ours = NF4Linear.quantized(w, None, double_quant=double_quant)
    assert torch.equal(ours.packed_weight, packed)
    assert torch.equal(ours.absmax, state.absmax)
    if double_quant:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.nested_quant_map, state.state2.code)
        assert torch.equal(ours.nested_offset, state.offset)
    assert torch.equal(ours.dequantize(), reference_values(packed, state))


@pytest.mark.parametrize("value", [0.0, 3e38, 1e-30, 1e-42])
def test_same_bytes_at_the_edges_of_the_floats(value: float) -> None:
    w = torch.full((3, 100), value)
    w[1, ::2] = 0.0
    packed, state = bnb.functional.quantize_4bit(w.clone(), quant_type="nf4")
    ours = NF4Linear.quantized(w, None, double_quant=False)
    assert torch.equal(ours.packed_weight, packed)
    assert torch.equal(ours.absmax, state.absmax)


def test_same_bytes_on_ties() -> None:
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    between = (table[1:] + table[:-1]) / 2
    nudged = torch.cat([between, between.nextafter(torch.tensor(2.0)), -between, table, -table])
    w = torch.zeros(1, 128)
    w[0, : nudged.numel()], w[0, 127] = nudged, 1.0
    packed, _ = bnb.functional.quantize_4bit(w.clone(), quant_type="nf4")
    assert torch.equal(NF4Linear.quantized(w, None, double_quant=False).packed_weight, packed)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (37, 70), (5, 63)])
def test_state_dicts_are_interchangeable(shape: tuple[int, int], double_quant: bool) -> None:
    rows, columns = shape
    w = weight(shape, 7, 1.0, torch.bfloat16)
    theirs = bnb.nn.Linear4bit(
        columns, rows, bias=True, quant_type="nf4", compress_statistics=double_quant
    )
    theirs.weight = bnb.nn.Params4bit(
        w.clone(), quant_type="nf4", compress_statistics=double_quant, requires_grad=False
    )
    theirs.to("cpu")
    ours = NF4Linear.quantized(w, theirs.bias.detach(), double_quant=double_quant)
    saved, written = theirs.state_dict(), ours.state_dict()
    assert set(saved) == set(written)
    for name in set(saved) - {"weight.quant_state.bitsandbytes__nf4"}:
        assert torch.equal(saved[name], written[name]), name
    read = NF4Linear.restored(saved)
    assert torch.equal(read.dequantize(), ours.dequantize())
    statistics = {k: v for k, v in written.items() if k.startswith("weight.")}
    back = bnb.nn.Params4bit.from_prequantized(written["weight"], statistics, device="cpu")
    assert torch.equal(reference_values(back.data, back.quant_state), ours.dequantize())


def test_int8_values_agree() -> None:
    w = weight((40, 70), 3, 1.0, torch.float16)
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(w.clone())
    ours = Int8Linear.quantized(w, None)
    assert torch.equal(ours.SCB, absmax)
    assert (ours.packed_weight.int() - codes.int()).abs().max() <= 1
    held = Int8Linear((40, 70), torch.float32, None, weight=codes, SCB=absmax)
    assert torch.equal(held.dequantize(), bnb.functional.int8_vectorwise_dequant(codes, absmax))


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_bitsandbytes_are_adapted_by_their_bytes(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "FAST_HALVES_ON_CPU", frozenset())
    w = weight((40, 70), 3, 1.0, torch.float16)
    if bits == 4:
        layer = bnb.nn.Linear4bit(70, 40, bias=True, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(w.clone(), quant_type="nf4", requires_grad=False)
        expected = NF4Linear.quantized(w, None).dequantize()
    else:
        layer = bnb.nn.Linear8bitLt(70, 40, bias=True, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False)
        expected = Int8Linear.quantized(w, None).dequantize()
    layer.to("cpu")
    view = frozen(layer)
    assert isinstance(view, ForeignLinear)
    assert kind(layer) == "linear"
    held = view.dequantize().to(expected.dtype)
    assert torch.allclose(held, expected, atol=float(w.abs().max()) / 127)
    x = torch.randn(3, 70, dtype=torch.float16, requires_grad=True)
    y = view.linear(x)
    y.sum().backward()
    assert x.grad is not None
    wide = dense(*view.packed(), torch.float32)
    assert torch.equal(x.grad, (torch.ones(y.shape) @ wide).half())


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=40, intermediate_size=98, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("dense")
    model.save_pretrained(path)
    load_tokenizer().save_pretrained(path)
    return str(path)


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED["pocket"])


@pytest.mark.parametrize("double_quant", [True, False])
def test_hub_style_checkpoint_loads(
    model: LlamaForCausalLM,
    folder: str,
    tmp_path_factory: pytest.TempPathFactory,
    double_quant: bool,
) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
    )
    path = tmp_path_factory.mktemp("hub")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(path)
    load_tokenizer().save_pretrained(path)
    loaded, _ = load(str(path))
    expected = quantize(copy.deepcopy(model), "nf4", double_quant=double_quant)
    found = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_what_we_save_bitsandbytes_loads(
    folder: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ours")
    ours, tokenizer = load(folder, "nf4")
    ours.save_pretrained(path)
    tokenizer.save_pretrained(path)
    theirs = AutoModelForCausalLM.from_pretrained(path)
    for name, layer in ours.named_modules():
        if isinstance(layer, NF4Linear):
            other = theirs.get_submodule(name)
            assert isinstance(other, bnb.nn.Linear4bit)
            values = reference_values(other.weight.data, other.weight.quant_state)
            assert torch.equal(values, layer.dequantize())


def test_int8_checkpoint_loads(folder: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("int8")
    config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    theirs.save_pretrained(path)
    load_tokenizer().save_pretrained(path)
    loaded, _ = load(str(path))
    layer = loaded.model.layers[0].self_attn.q_proj
    other = theirs.model.layers[0].self_attn.q_proj
    assert isinstance(layer, Int8Linear)
    assert torch.equal(layer.packed_weight, other.weight.data)
    assert torch.equal(layer.SCB, other.weight.SCB)
    assert torch.equal(layer.bias, other.bias.to(layer.bias.dtype))
