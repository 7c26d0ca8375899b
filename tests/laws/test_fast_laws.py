"""Every fast path computes what the plain one does: values, gradients, outputs; and can be off."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from law_cases import STORED, far, randomise_adapter, seeded
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import inlay
from inlay.kernels import loss as loss_kernel
from inlay.kernels.switches import PATHS, plain
from inlay.model.fast.attention import FastBackbone
from inlay.model.fast.base import Fast
from inlay.model.fast.causal_lm import FastCausalLM
from inlay.model.fast.layers import FastGate, FastNorm
from inlay.storage.registry import frozen

SMALL = {
    "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 61, "intermediate_size": 72, "initializer_range": 0.15,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=10)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_embd=40, n_layer=2, n_head=4, vocab_size=61, n_positions=80, initializer_range=0.15,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )
    ),
}  # fmt: skip
HELD = ("fp32", "bf16", "nf4")
PLACES = {"all": ("all-linear", ()), "with-head": ("all-linear", ("lm_head",)), "top": ("mlp", ())}


def built(name: str, storage: str = "fp32") -> Any:
    torch.manual_seed(0)
    model = STORED[storage].hold_model(MODELS[name]())
    inlay.attach(model, inlay.LoRA(rank=4, alpha=8))
    randomise_adapter(model)
    return model.train()


def batch(shape: str) -> dict[str, Tensor]:
    """Rows with masked prompts: as they are, padded on the right, on the left, or packed."""
    ids = torch.randint(1, 61, (2, 9), generator=seeded(3))
    labels = ids.clone()
    labels[:, :4] = -100
    if shape == "dense":
        return {"input_ids": ids, "labels": ids.clone()}
    if shape == "masked":
        return {"input_ids": ids, "labels": labels}
    if shape in ("right", "left"):
        mask = torch.ones_like(ids)
        mask[1, slice(6, None) if shape == "right" else slice(None, 3)] = 0
        return {"input_ids": ids, "labels": labels.where(mask == 1, -100), "attention_mask": mask}
    assert shape == "packed"
    positions = torch.cat([torch.arange(5), torch.arange(9), torch.arange(4)])[None]
    return {
        "input_ids": ids.reshape(1, 18),
        "labels": labels.reshape(1, 18),
        "position_ids": positions,
    }


def step(model: Any, inputs: dict[str, Tensor], **more: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradient of every trained tensor."""
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(**inputs, use_cache=False, **more).loss
    return loss.detach(), list(torch.autograd.grad(loss, trained))


def assert_same_step(model: Any, inputs: dict[str, Tensor], tolerance: float, **more: Any) -> None:
    loss, grads = step(model, inputs, **more)
    with plain():
        wanted, dense = step(model, inputs, **more)
    assert far(loss, wanted) < tolerance
    assert torch.isfinite(loss)
    scale = max(float(g.abs().max()) for g in dense)
    for ours, theirs in zip(grads, dense, strict=True):
        assert float((ours - theirs).abs().max()) / scale < tolerance


@pytest.mark.parametrize("shape", ["dense", "masked", "right", "left", "packed"])
@pytest.mark.parametrize("storage", HELD)
@pytest.mark.parametrize("name", MODELS)
def test_a_fast_step_is_a_plain_step(name: str, storage: str, shape: str) -> None:
    if storage == "nf4" and name == "gpt2":
        return
    assert_same_step(built(name, storage), batch(shape), 2 * STORED[storage].tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_each_path_can_be_off_alone(path: str) -> None:
    model = built("llama")
    inputs = batch("masked")
    loss, grads = step(model, inputs)
    with plain(path):
        assert_same_step(model, inputs, 1e-5)
        other, others = step(model, inputs)
    assert far(other, loss) < 1e-5
    assert all(far(a, b) < 1e-3 for a, b in zip(others, grads, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3"])
def test_no_plain_module_is_left(name: str) -> None:
    model = built(name)
    kinds = [type(m).__mro__[1] for m in model.modules() if isinstance(m, Fast)]
    for wanted in (FastCausalLM, FastBackbone, FastNorm, FastGate):
        assert wanted in kinds
    assert not [
        m
        for m in model.modules()
        if type(m).__name__.endswith("RMSNorm") and not isinstance(m, Fast)
    ]


def test_detach_leaves_no_fast_module() -> None:
    torch.manual_seed(0)
    model: Any = MODELS["llama"]()
    classes = [type(m) for m in model.modules()]
    inlay.attach(model, inlay.LoRA(rank=4))
    assert model.config._attn_implementation == "inlay"
    inlay.detach(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == "sdpa"


def test_a_head_that_is_adapted_trains() -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    inlay.attach(model, inlay.LoRA(rank=4), targets=("lm_head", "q_proj"))
    randomise_adapter(model)
    assert_same_step(model.train(), batch("masked"), 1e-5)


def test_a_head_in_four_bits_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    inlay.quantize(model, "nf4", skip=("q_proj",))
    inlay.attach(model, inlay.LoRA(rank=4), exclude="lm_head")
    randomise_adapter(model)
    monkeypatch.setattr(loss_kernel, "LOGIT_BYTES", 4 * 61 * 3)  # three rows at a time
    assert_same_step(model.train(), batch("masked"), 1e-5)


def test_checkpointing_computes_the_same() -> None:
    model = built("llama")
    wanted = step(model, batch("packed"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    got = step(model, batch("packed"))
    assert torch.equal(wanted[0], got[0])
    assert all(torch.equal(a, b) for a, b in zip(wanted[1], got[1], strict=True))


def test_the_loss_is_over_the_items_of_the_whole_batch() -> None:
    model = built("llama")
    assert_same_step(model, batch("masked"), 1e-5, num_items_in_batch=torch.tensor(100))


def test_logits_are_there_when_asked_for() -> None:
    model = built("llama")
    got = model(**batch("masked"))
    with plain():
        wanted = model(**batch("masked"))
    for logits in (got.logits, got["logits"], got[1]):
        assert far(logits, wanted.logits) < 1e-5
    assert torch.equal(got[0], got.loss)


def test_rows_do_not_see_each_other_when_packed() -> None:
    model = built("llama")
    packed = batch("packed")
    together = model(**packed, use_cache=False)
    assert far(together.logits, together.logits) == 0
    cuts = [(0, 5), (5, 14), (14, 18)]
    for start, stop in cuts:
        alone = model(input_ids=packed["input_ids"][:, start:stop], use_cache=False).logits
        assert far(together.logits[:, start:stop], alone) < 1e-5


def test_a_label_nowhere_is_nan_as_in_transformers() -> None:
    model = built("llama")
    inputs = batch("masked")
    inputs["labels"].fill_(-100)
    assert model(**inputs).loss.isnan()
    with plain():
        assert model(**inputs).loss.isnan()


def test_nothing_wide_is_kept_for_the_gradient() -> None:
    model = built("llama", "bf16")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(**batch("dense"))
    wide = [t for t in saved if t.dtype == torch.float32 and t.numel() >= 18 * 40]
    frozen = {p.data_ptr() for p in model.parameters()}
    assert not [t.shape for t in wide if t.data_ptr() not in frozen]


@pytest.mark.parametrize("words", [("attntion",), ("loss", "head")])
def test_an_unknown_path_is_named(words: tuple[str, ...]) -> None:
    with pytest.raises(inlay.UsageError, match="there is no fast path"), plain(*words):
        pass


@pytest.mark.parametrize("storage", HELD)
def test_eight_bits_are_near_and_can_be_off(storage: str) -> None:
    model = built("llama", storage)
    inputs = batch("masked")
    wanted, dense = step(model, inputs)
    inlay.compute_in_8_bits(model)
    loss, grads = step(model, inputs)
    assert 0 < far(loss, wanted) < 0.02
    for ours, theirs in zip(grads, dense, strict=True):
        ours, theirs = ours.flatten(), theirs.flatten()
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98
    inlay.compute_in_8_bits(model, on=False)
    assert torch.equal(step(model, inputs)[0], wanted)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize(("width", "out"), [(128, 192), (128, 96)])
def test_an_8_bit_product_is_the_product(storage: str, native: bool, width: int, out: int) -> None:
    layer: Any = STORED[storage].hold(torch.nn.Linear(width, out, bias=False))
    inlay.compute_in_8_bits(layer)
    base = frozen(layer)
    x = torch.randn(7, width, generator=seeded(2)).to(base.dtype).requires_grad_()
    w = base.dequantize().float()
    g = torch.randn(7, out, generator=seeded(4)).to(base.dtype)
    with nullcontext() if native else plain("native"):
        y = base.matmul(x)
        (back,) = torch.autograd.grad(y, x, g)
    forward, backward = (
        (ours.float() - wanted).norm() / wanted.norm()
        for ours, wanted in ((y, x.float() @ w.T), (back, g.float() @ w))
    )
    assert 1e-4 < backward < 0.02
    if out > width:
        assert 1e-4 < forward < 0.02
    else:
        assert forward <= torch.finfo(base.dtype).eps


def test_a_gated_product_is_not_kept() -> None:
    model = built("llama")
    seen: list[weakref.ref[Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: seen.append(weakref.ref(args[0]))
        )
    loss = model(**batch("dense"), use_cache=False).loss
    assert len(seen) == 2
    assert not any(product() is not None for product in seen)
    with plain("gates"):
        kept = model(**batch("dense"), use_cache=False).loss
    assert torch.equal(loss, kept)


HEADS = {"head_dim": 10, "pad_token_id": 0}
OTHERWISE: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "positions from the mask": (
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=40, ffn_dim=72, num_hidden_layers=2, num_attention_heads=4,
                vocab_size=61, word_embed_proj_dim=40, dropout=0.0, init_std=0.15,
            )
        ),
        "q_proj",
    ),
    "an attention of its own": (
        lambda: FalconForCausalLM(
            FalconConfig(
                hidden_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
                initializer_range=0.15,
            )
        ),
        "lm_head",
    ),
    "a decoder that sees both ways": (
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**SMALL, **HEADS, use_bidirectional_attention=True)
        ),
        "q_proj",
    ),
    "a decoder made an encoder": (
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL, is_causal=False)),
        "q_proj",
    ),
    "chunks": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(
                **SMALL, **HEADS, intermediate_size_mlp=72, attention_chunk_size=3,
                num_local_experts=2,
            )
        ),
        "q_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", ["dense", "right"])
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_mask_that_segments_do_not_say_stays(name: str, shape: str) -> None:
    """Training and evaluation are plain transformers', whose mask says more than segments do."""
    torch.manual_seed(0)
    make, target = OTHERWISE[name]
    model: Any = make().eval()
    inputs = batch(shape)
    with torch.no_grad():
        before = model(**inputs).logits
    inlay.attach(model, inlay.LoRA(rank=4), targets=target)
    with torch.no_grad():
        assert far(model(**inputs).logits, before) < 1e-5
    randomise_adapter(model)
    assert_same_step(model.train(), inputs, 1e-5)
