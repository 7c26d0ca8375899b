"""A fast path is put on what it was found to compute; otherwise it steps aside and says so."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import inlay
from inlay.kernels.switches import plain
from inlay.model import process
from inlay.model.adapters.registry import adapter_places, notes
from inlay.model.fast import attention, layers, proof
from inlay.model.fast.base import Fast

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 96, "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(12) < torch.tensor([[12], [7]])).long()


def adapted(model: PreTrainedModel) -> Any:
    inlay.attach(model, inlay.LoRA(rank=2))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for tensor in params.parameters():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.train()


def step(model: Any, **call: Any) -> tuple[Tensor, Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(**call, use_cache=False).loss
    grads = torch.autograd.grad(loss, trained)
    return loss.detach(), torch.cat([g.flatten() for g in grads])


def assert_plain(model: Any, mask: Tensor | None = MASK) -> None:
    """A training step is that of the model's own code."""
    labels = IDS if mask is None else IDS.where(mask == 1, -100)
    call = {"input_ids": IDS, "labels": labels, "attention_mask": mask}
    got = step(model, **call)
    with plain():
        wanted = step(model, **call)
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def fast_kinds(model: nn.Module) -> set[str]:
    return {type(m).__mro__[1].__name__ for m in model.modules() if isinstance(m, Fast)}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "verdicts", {})
    monkeypatch.setattr(proof, "warned", set())


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **more}))


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, word_embed_proj_dim=32, dropout=0.0, init_std=0.2,
    )  # fmt: skip
    return OPTForCausalLM(config)


def gemma3() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=64)
    return Gemma3ForCausalLM(config)


def deepseek() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SMALL, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1, kv_lora_rank=8,
        first_k_dense_replace=1, q_lora_rank=12, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def test_what_agrees_is_put_on_and_nothing_is_said() -> None:
    model = adapted(llama())
    assert {"FastCausalLM", "FastBackbone", "FastLastBlock", "FastNorm", "FastGate"} <= fast_kinds(
        model
    )
    assert notes(model) == ()
    assert_plain(model)


def test_a_kernel_that_is_wrong_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.rms_norm
    monkeypatch.setattr(layers, "rms_norm", lambda x, w, e: (1.01 * right(x, w, e)[0], None))
    with pytest.warns(UserWarning, match=r"FastNorm steps aside on .*LlamaRMSNorm.* differs by"):
        model = adapted(llama())
    assert "FastNorm" not in fast_kinds(model)
    assert "FastNorm steps aside" in notes(model)[0]
    assert "FastNorm steps aside" in str(inlay.report(model))
    assert_plain(model)


def test_a_gradient_that_is_wrong_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.segment_attention

    def no_gradient_to_keys(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Any:
        return right(q, k.detach(), v, *more)

    monkeypatch.setattr(attention, "segment_attention", no_gradient_to_keys)
    with pytest.warns(UserWarning, match=r"FastBackbone steps aside on .*gradient of .* differs"):
        model = adapted(llama())
    assert_plain(model)


def test_a_path_that_raises_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(attention, "segment_attention", broken)
    with pytest.warns(UserWarning, match="it raises RuntimeError: no such kernel"):
        model = adapted(llama())
    assert_plain(model)


class Rescaled(LlamaRMSNorm):
    """Reads like the norm it comes from, and has another weight."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return 2.0 if name == "variance_epsilon" and not super().__getattribute__("fast") else found

    @property
    def fast(self) -> bool:
        return isinstance(self, Fast)


def test_a_module_of_no_library_proves_itself() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Rescaled(16)
            self.layer = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x))

    model = Block()
    x = torch.randn(3, 16)
    before = model(x)
    with pytest.warns(UserWarning, match="FastNorm steps aside on norm"):
        inlay.attach(model, inlay.LoRA(rank=2))
    model.train()
    assert torch.equal(model(x), before)


class OtherMask(LlamaModel):
    """A decoder whose tokens see one token less than its masks say."""

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if self.config._attn_implementation == "inlay" and self.training:
            kwargs["inputs_embeds"] = 2 * self.embed_tokens(kwargs.pop("input_ids"))
        create_causal_mask = super().forward  # reads like a decoder that makes its masks
        return create_causal_mask(*args, attention_mask=attention_mask, **kwargs)


def test_a_decoder_that_knows_the_name_of_its_attention_steps_aside() -> None:
    model = llama()
    model.model = OtherMask(model.config)
    with pytest.warns(UserWarning, match="steps aside on model .OtherMask."):
        model = adapted(model)
    assert_plain(model)


@pytest.mark.parametrize("padded", [True, False])
def test_heads_wider_than_values_train(padded: bool) -> None:
    model = adapted(deepseek())
    assert "FastBackbone" in fast_kinds(model)
    assert_plain(model, MASK if padded else None)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_head_that_does_more_than_multiply_is_its_own(is_decoder: bool) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        **{**SMALL, "max_position_embeddings": 99}, is_decoder=is_decoder,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    assert_plain(adapted(RobertaForCausalLM(config)))


@pytest.mark.parametrize("window", [6, 2048])
def test_layers_that_read_the_mask_keep_it(window: int) -> None:
    torch.manual_seed(0)
    config = DogeConfig(**SMALL, num_key_value_heads=2, keep_window_size=window)
    model = adapted(DogeForCausalLM(config))
    assert "packed" not in model.model.proven
    assert_plain(model)
    assert_plain(model, None)


def test_positions_from_the_mask_stay_and_padded_rows_are_fast() -> None:
    model = adapted(opt())
    assert model.model.decoder.proven == {"whole", "padded", "packed"}
    assert_plain(model)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt", "deepseek"])
def test_rows_in_one_sequence_are_told_apart_where_the_model_does_so(
    family: str, cached: bool
) -> None:
    model = adapted({"llama": llama, "opt": opt, "deepseek": deepseek}[family]())
    assert "FastBackbone" in fast_kinds(model)
    positions = torch.tensor([*range(5), *range(7)]).expand(2, 12)
    call = {"input_ids": IDS, "labels": IDS, "position_ids": positions, "use_cache": cached}
    got = model(**call)
    with plain():
        wanted = model(**call)
    assert_close((got.loss, got.logits), (wanted.loss, wanted.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek", "opt"])
def test_labels_that_score_padding_score_what_the_model_says_there(family: str) -> None:
    makers = {"llama": llama, "gemma3": gemma3, "deepseek": deepseek, "opt": opt}
    model = adapted(makers[family]())
    assert "FastBackbone" in fast_kinds(model)
    call = {"input_ids": IDS, "labels": IDS, "attention_mask": MASK}
    got = step(model, **call)
    with plain():
        wanted = step(model, **call)
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_users_model_and_random_numbers_are_as_they_were() -> None:
    model = llama()
    model.train()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: pytest.fail("the hook was called"))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        inlay.attach(model, inlay.LoRA(rank=2))
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items() if n in before)
    assert all(m.training for m in model.modules())


def test_a_class_is_tried_once_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(llama())
    known = len(proof.verdicts)
    adapted(llama(num_hidden_layers=5, vocab_size=64))
    adapted(llama())
    assert len(proof.verdicts) == known


def test_a_model_without_values_is_tried_on_a_small_one() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3)).to(torch.bfloat16)
    inlay.attach(model, inlay.LoRA(rank=2))
    assert {"FastCausalLM", "FastBackbone"} <= fast_kinds(model)
    assert notes(model) == ()


def test_what_a_gate_is_made_of_is_packed_or_dense() -> None:
    model: Any = llama(hidden_size=64, intermediate_size=128)
    inlay.quantize(model, "nf4")
    inlay.attach(model, inlay.LoRA(rank=2))
    assert isinstance(model.model.layers[0].mlp, LlamaMLP)
    assert "FastGate" in fast_kinds(model)


def without_other_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no model of another test need a change of the process."""
    fresh = {name: process.Change(change.make) for name, change in process.CHANGES.items()}
    monkeypatch.setattr(process, "CHANGES", fresh)


def test_the_process_has_its_settings_back_after_the_last_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(
        process, "CHANGES", {n: process.Change(c.make) for n, c in process.CHANGES.items()}
    )
    monkeypatch.setattr(process, "keep_memory", lambda: done.append("kept"))
    monkeypatch.setattr(process, "release_memory", lambda: done.append("released"))
    torch.backends.mha.set_fastpath_enabled(True)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    first, second = nn.Sequential(encoder), nn.Sequential(nn.Linear(4, 4))
    inlay.attach(first, inlay.LoRA(rank=2), targets="linear1")
    inlay.attach(second, inlay.LoRA(rank=2))
    assert not torch.backends.mha.get_fastpath_enabled()
    inlay.detach(first)
    assert "released" not in done
    inlay.detach(second)
    assert done[-1] == "released"
    assert torch.backends.mha.get_fastpath_enabled()


def test_settings_come_back_with_the_last_model_that_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(
        process, "CHANGES", {n: process.Change(c.make) for n, c in process.CHANGES.items()}
    )
    monkeypatch.setattr(process, "keep_memory", lambda: None)
    monkeypatch.setattr(process, "release_memory", lambda: done.append("released"))
    model = inlay.attach(nn.Sequential(nn.Linear(4, 4)), inlay.LoRA(rank=2))
    del model
    gc.collect()
    assert done == ["released"]


def test_models_with_one_configuration_object_are_all_fast():
    config = LlamaConfig(**SMALL, num_key_value_heads=2)
    models: list[Any] = [adapted(LlamaForCausalLM(config)) for _ in range(2)]
    assert all(isinstance(model.model, attention.FastBackbone) for model in models)
    for model in models:
        assert_plain(model)
    inlay.detach(models[0])
    assert_plain(models[1])
