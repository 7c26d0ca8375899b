"""Weights that the model reads past `forward` are the adapted, and the dequantised, ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    WavLMConfig,
    WavLMModel,
)

import inlay
from inlay.errors import StorageError
from inlay.model.adapters.registry import adapter_places
from inlay.storage.reads import is_tool

IDS = {"input_ids": torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))}


def mamba() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
    return MambaForCausalLM(MambaConfig(**sizes, time_step_rank=4))


def falcon_mamba() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
    return FalconMambaForCausalLM(FalconMambaConfig(**sizes, time_step_rank=4))


def longcat() -> nn.Module:
    config = LongcatFlashConfig(
        vocab_size=64, hidden_size=32, num_layers=1, num_attention_heads=2, ffn_hidden_size=32,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, head_dim=8,
        v_head_dim=8, moe_topk=2, n_routed_experts=4, zero_expert_num=2,
        expert_ffn_hidden_size=16, max_position_embeddings=32,
    )  # fmt: skip
    return LongcatFlashForCausalLM(config)


def rwkv() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32}
    return RwkvForCausalLM(RwkvConfig(**sizes, num_hidden_layers=2, context_length=16))


def wavlm() -> nn.Module:
    config = WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
        num_buckets=8, max_bucket_distance=16,
    )  # fmt: skip
    return WavLMModel(config)


class Attends(nn.Module):
    """torch's attention, which reads the weight of its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 1)


Case = tuple[Callable[[], nn.Module], dict[str, Tensor], Any]
AUDIO = {"input_values": torch.randn(1, 400, generator=torch.Generator().manual_seed(2))}
ROWS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
ADAPTED: dict[str, Case] = {
    "mamba": (mamba, IDS, "all-linear"),
    "falcon_mamba": (falcon_mamba, IDS, "all-linear"),
    "longcat": (longcat, IDS, "all-linear"),
    "wavlm": (wavlm, AUDIO, "all-linear"),
    "attention": (Attends, {"x": ROWS}, ["out_proj"]),
    "encoder": (encoder, {"src": ROWS}, ["linear1", "linear2"]),
}
PACKED: dict[str, Case] = {
    "mamba": (mamba, IDS, None),
    "falcon_mamba": (falcon_mamba, IDS, None),
    "longcat": (longcat, IDS, None),
    "rwkv": (rwkv, IDS, None),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = model(**batch)
    return found if isinstance(found, Tensor) else found[0]


def moved(model: nn.Module, size: float = 0.2) -> nn.Module:
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for p in params.parameters():
                p.add_(size * torch.randn(p.shape, generator=draw))
    return model


@pytest.mark.parametrize("case", ADAPTED.values(), ids=ADAPTED)
@pytest.mark.parametrize("method", [inlay.LoRA(rank=2), inlay.DoRA(rank=2)], ids=["lora", "dora"])
def test_an_adapter_acts_and_trains(case: Case, method: Any) -> None:
    make, batch, targets = case
    model = moved(inlay.attach(made(make), method, targets=targets))
    output(model, batch).square().mean().backward()
    for name, params in adapter_places(model, "default"):
        assert all(p.grad is not None and p.grad.any() for p in params.parameters()), name
    with torch.no_grad():
        adapted = output(model, batch)
        with inlay.disabled(model):
            assert not torch.allclose(adapted, output(model, batch), atol=1e-3)
        inlay.merge(model, inputs=[batch])
        torch.testing.assert_close(output(model, batch), adapted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_a_packed_weight_reads_dequantised(case: Case, storage: str) -> None:
    dense = made(case[0])
    model = inlay.quantize(copy.deepcopy(dense), storage)
    held = [(n, m) for n, m in model.named_modules() if getattr(m, "storage", None) == storage]
    with torch.no_grad():
        for name, layer in held:
            dense.get_submodule(name)._parameters["weight"].copy_(layer.dequantize())  # type: ignore
        got, wanted = output(model, case[1]), output(dense, case[1])
    assert held
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


class Reads(nn.Module):
    """A layer of which only weight and bias are read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("storage", ["dense", "int8", "nf4"])
@pytest.mark.parametrize("method", [inlay.LoRA(rank=2), inlay.IA3()], ids=["lora", "ia3"])
def test_gradients_are_those_of_a_call(storage: str, method: Any) -> None:
    x = torch.randn(3, 64)
    model = inlay.quantize(made(Reads), storage)
    moved(inlay.attach(model, method, targets=["layer"]))
    params = next(adapter_places(model, "default"))[1]
    model(x).square().sum().backward()
    read = [p.grad for p in params.parameters()]
    params.zero_grad()
    model.layer(x).square().sum().backward()  # type: ignore[operator]
    for one, other in zip(read, params.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, atol=1e-3, rtol=1e-3)


def test_to_write_into_a_computed_weight_is_refused() -> None:
    for model in (inlay.quantize(Reads(), "int8"), inlay.attach(Reads(), inlay.LoRA(rank=2))):
        with pytest.raises(StorageError, match=r"is written to from outside \(div_\)"):
            model.layer.weight.div_(2)  # type: ignore[operator, union-attr]
        with pytest.raises(StorageError, match="change the model before"):
            model.layer.weight.data[0] = 1.0  # type: ignore[operator, union-attr]
        model.layer.weight.requires_grad_(False)  # type: ignore[operator, union-attr]


def test_tools_get_the_parameter() -> None:
    assert is_tool("accelerate.utils.modeling")
    assert is_tool("inlay.model.merge.merge")
    assert not is_tool("accelerated")
    assert not is_tool("transformers.models.mamba.modeling_mamba")
    layer = inlay.attach(Reads(), inlay.LoRA(rank=2)).layer
    assert layer.get_parameter("weight") is layer._parameters["weight"]  # type: ignore[operator]


def test_a_compiled_model_reads_the_same() -> None:
    model = moved(inlay.attach(made(Reads), inlay.LoRA(rank=2), targets=["layer"]))
    x = torch.randn(3, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_bitsandbytes_layer_stays_readable_after_it_ran_without_its_adapter() -> None:
    """Its own forward repacks the weight on a CPU in evaluation, and fails on narrow layers."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(32, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    model = nn.Sequential(layer.to("cpu")).eval()
    moved(inlay.attach(model, inlay.LoRA(rank=2)))
    x = torch.randn(2, 32)
    with torch.no_grad():
        with inlay.disabled(model):
            torch.testing.assert_close(model(x), x @ layer.base.dequantize().T)
        assert not torch.allclose(model(x), x @ layer.base.dequantize().T, atol=1e-3)


class AsksForDtype(nn.Module):
    """A layer that is called in the dtype of its weight, as T5's `wo` is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        assert self.layer.weight.shape == (16, 16)
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.mark.parametrize("case", ADAPTED.values(), ids=ADAPTED)
def test_saving_says_where_hf_peft_leaves_an_adapter_dead(case: Case, tmp_path: Path) -> None:
    make, batch, targets = case
    model = inlay.attach(made(make), inlay.LoRA(rank=2), targets=targets)
    with torch.no_grad():
        output(model, batch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        inlay.save_adapter(model, tmp_path)
    texts = " ".join(str(w.message) for w in said)
    if make is Attends:  # which HF PEFT has its own layer for
        assert "the model reads the weight" not in texts
    else:
        assert "HF PEFT adapts the layer's forward, and the model reads the weight" in texts


def test_a_weight_of_which_only_the_dtype_is_read_is_no_difference(tmp_path: Path) -> None:
    model = inlay.attach(AsksForDtype(), inlay.LoRA(rank=2), targets="all-linear")
    model(ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inlay.save_adapter(model, tmp_path)
