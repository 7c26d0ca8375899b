"""Merging: what it reports, what it refuses, and that a refusal leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from inlay.errors import MergeError
from inlay.methods.bottleneck import Bottleneck
from inlay.methods.lora import LoRA
from inlay.methods.norms import NormTuning
from inlay.methods.prefix import PrefixTuning
from inlay.methods.prompt import PromptTuning
from inlay.model.adapters.attach import attach, use
from inlay.model.adapters.registry import adapter_places, adapters
from inlay.model.load.quantize import quantize
from inlay.model.merge.merge import merge
from inlay.model.merge.plan import Plan
from inlay.model.stream.host import embedding_on_host
from inlay.storage.nf4 import NF4Linear
from inlay.storage.streamed import StreamedEmbedding

IDS = torch.arange(12).view(2, 6)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(model: Any, scale: float, method: Any = None) -> Any:
    attach(model, method or LoRA(rank=4, alpha=4))
    return moved(model, scale)


def moved(model: Any, scale: float) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for p in params.parameters():
                p += scale * torch.randn_like(p)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model: Any) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def test_report_numbers() -> None:
    model = adapted(llama(), 0.1)
    found = merge(model, inputs=[{"input_ids": IDS}])
    assert (found.positions, found.layers, found.inputs) == (12, 14, "given")
    assert (found.dtype, found.untied) == ("float32", ())
    assert found.top1_agreement == 1.0
    assert 0 <= found.kl < 1e-9
    assert 0 < found.max_logit_difference < 1e-4
    assert found.surviving_fraction == pytest.approx(1, abs=1e-5)


def test_padding_is_not_compared() -> None:
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask}
    assert merge(adapted(llama(), 0.1), inputs=[batch]).positions == 10


def test_bf16_says_its_dtype() -> None:
    model = adapted(llama(torch.bfloat16), 0.1)
    found = merge(model)
    assert found.dtype == "bfloat16"
    assert 0.9 < found.surviving_fraction < 1.1
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_bf16_that_rounds_part_of_the_update_away_is_judged_by_the_outputs() -> None:
    model = adapted(llama(torch.bfloat16), 5e-4)
    before, output = state(model), logits(model)
    with pytest.raises(MergeError, match=r"keep only .*% of what the adapter changes .*float32"):
        merge(model)
    assert_untouched(model, before, output)
    with pytest.warns(UserWarning, match=r"% of the update is left .* the merged model keeps"):
        found = merge(model, accept_loss=True)
    assert found.effect_kept < 0.6


def test_bf16_that_keeps_the_effect_is_merged_with_a_warning() -> None:
    model = adapted(llama(torch.bfloat16), 0.03)
    with pytest.warns(UserWarning, match=r"keeps 9\d\.\d% of what the adapter changes"):
        found = merge(model, minimum_survival=1.5)
    assert 0.9 < found.effect_kept < 1


def test_keeping_nf4_is_refused_when_it_erases_the_update() -> None:
    model = adapted(quantize(llama(), "nf4"), 5e-3)
    before, output = state(model), logits(model)
    with pytest.raises(MergeError, match="storage='dense'"):
        merge(model, storage="keep")
    assert_untouched(model, before, output)
    found = merge(model)
    assert found.surviving_fraction == pytest.approx(1, abs=1e-4)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(model), output, atol=1e-4, rtol=1e-4)


def assert_untouched(model: Any, before: dict[str, Tensor], output: Tensor) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert "default" in adapters(model)
    assert torch.equal(logits(model), output)


def test_a_merge_that_differs_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(), 0.1)
    before, output = state(model), logits(model)
    layers = [type(m) for m in model.modules()]
    monkeypatch.setattr(LoRA, "weight", lambda self, p, w: w + 0.9 * self.scale * (p.B @ p.A))
    with pytest.raises(MergeError, match="was left adapted"):
        merge(model)
    assert_untouched(model, before, output)
    assert [type(m) for m in model.modules()] == layers


def test_norms_merge_beside_nf4() -> None:
    model = adapted(quantize(llama(), "nf4"), 0.1, NormTuning())
    output = logits(model)
    merge(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize(
    "method", [Bottleneck(), PrefixTuning(tokens=2), PromptTuning(tokens=2)], ids=lambda m: m.name
)
def test_methods_that_cannot_merge_say_so(method: Any) -> None:
    model = adapted(llama(), 0.1, method)
    before, output = state(model), logits(model)
    with pytest.raises(MergeError, match=rf"\({method.name}\) adds computation that no weight"):
        merge(model)
    assert_untouched(model, before, output)


def test_nothing_to_merge() -> None:
    model = adapted(llama(), 0.1)
    use(model)
    with pytest.raises(MergeError, match="no adapter is active"):
        merge(model)
    use(model, "default")
    with pytest.raises(MergeError, match="must be 'dense' or 'keep'"):
        merge(model, storage="sparse")  # pyright: ignore[reportArgumentType]


def test_conv1d_and_short_contexts() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61, n_positions=16)
    model = adapted(GPT2LMHeadModel(config).eval(), 0.1)
    output = logits(model)
    merge(model)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    torch.testing.assert_close(logits(model), output, atol=1e-5, rtol=1e-5)


def test_a_quantised_conv1d_merged_dense_is_one_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=32, initializer_range=0.15,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = adapted(quantize(GPT2LMHeadModel(config).eval(), "nf4"), 0.1)
    merge(model)
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_quantised_base_merged_dense_is_a_plain_transformers_model(tmp_path: Path) -> None:
    model = adapted(quantize(llama(), "nf4"), scale=0.05)
    with torch.no_grad():
        before = model(IDS).logits
    assert merge(model).surviving_fraction > 0.999
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, before, atol=1e-3, rtol=1e-3)


def test_an_embedding_on_the_host_merges() -> None:
    model = embedding_on_host(llama(), "cpu")
    attach(model, LoRA(rank=4, alpha=4), targets=["embed_tokens", "q_proj"])
    moved(model, 0.1)
    before = logits(model)
    merge(model)
    assert isinstance(model.get_submodule("model.embed_tokens"), StreamedEmbedding)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_a_merge_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(), 0.1)
    before, output = state(model), logits(model)

    def fail(self: Plan, model: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Plan, "make_uniform", fail)
    with pytest.raises(MemoryError):
        merge(model)
    assert_untouched(model, before, output)


def test_a_model_that_is_the_layer() -> None:
    x = torch.randn(2, 64)
    model = moved(attach(nn.Linear(64, 64), LoRA(rank=2)), 0.1)
    before = model(x)
    merge(model, inputs=[{"input": x}])
    assert type(model) is nn.Linear
    torch.testing.assert_close(model(x), before)
    packed = moved(attach(quantize(nn.Linear(64, 64), "nf4"), LoRA(rank=2)), 0.1)
    with pytest.raises(MergeError, match="put it in a module"):
        merge(packed, inputs=[{"x": x}])
