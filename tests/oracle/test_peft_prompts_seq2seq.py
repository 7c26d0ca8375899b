"""Prompts on encoder-decoders: HF PEFT is the oracle for values, gradients, text and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import inlay
from inlay.model.seams.transformers import cache_argument
from inlay.peft import PeftModel, get_peft_model

IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.tensor([[4, 8, 15, 16, 23], [42, 6, 1, -100, -100]])
TOKENS = 3
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "prompt": (PromptTuningConfig, {}),
    "one prompt": (PromptTuningConfig, {"num_transformer_submodules": 1}),
    "p-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 20}),
    "prefix": (PrefixTuningConfig, {}),
}
every = pytest.mark.parametrize("method", METHODS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),
]


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, dropout_rate=0.0,
        initializer_factor=6.0, **ENDS,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def bart() -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
        max_position_embeddings=64, scale_embedding=True, init_std=0.3, bos_token_id=2,
        forced_eos_token_id=None, **ENDS,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


builds = pytest.mark.parametrize("build", [t5, bart])


def both(method: str, build: Any) -> tuple[Any, Any]:
    """The same adapter in both libraries."""
    found = []
    cls, options = METHODS[method]
    for make in (get_peft_model, peft.get_peft_model):
        base = build()
        torch.manual_seed(7)
        config = cls(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=TOKENS, **options)
        found.append(make(base, config).eval())
    return found[0], found[1]


def run(model: Any) -> Any:
    return model(input_ids=IDS, attention_mask=MASK, labels=LABELS)


@builds
@every
def test_the_same_seed_gives_the_same_values_counts_and_gradients(method: str, build: Any) -> None:
    found = both(method, build)
    assert found[0].get_nb_trainable_parameters() == found[1].get_nb_trainable_parameters()
    assert found[0].peft_config["default"] == found[1].peft_config["default"]
    results, grads = [], []
    for model in found:
        results.append(run(model))
        results[-1].loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-5)
    assert float(results[0].loss.detach()) == pytest.approx(float(results[1].loss.detach()))
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-6)


@builds
@every
def test_generated_text_is_hf_pefts(method: str, build: Any) -> None:
    """On transformers 5.24 HF PEFT generates without its prefix, which has another name there."""
    ours, theirs = both(method, build)
    call: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 7}
    for more in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        text = ours.generate(**call, **more)
        wanted = theirs.generate(**call, **more)
        if method == "prefix" and cache_argument(build().forward) != "past_key_values":
            with ours.disable_adapter():
                assert torch.equal(ours.generate(**call, **more), wanted)
        else:
            assert torch.equal(text, wanted)


@builds
@every
def test_either_library_reads_what_the_other_writes(
    method: str, build: Any, tmp_path: Path
) -> None:
    ours, theirs = both(method, build)
    with torch.no_grad():
        wanted = run(ours).logits
        ours.save_pretrained(tmp_path / "ours")
        read = run(peft.PeftModel.from_pretrained(build(), tmp_path / "ours")).logits
        torch.testing.assert_close(read, wanted, rtol=1e-4, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        back = run(PeftModel.from_pretrained(build(), tmp_path / "theirs")).logits
        torch.testing.assert_close(back, wanted, rtol=1e-4, atol=1e-5)
        plain = inlay.load_adapter(build(), tmp_path / "ours").eval()
        assert torch.equal(run(plain).logits, wanted)


@builds
@pytest.mark.parametrize(
    "method", [inlay.PromptTuning(tokens=TOKENS), inlay.PrefixTuning(tokens=TOKENS)]
)
def test_an_adapter_of_our_own_is_read_by_hf_peft_and_comes_off(
    method: Any, build: Any, tmp_path: Path
) -> None:
    model = build().eval()
    with torch.no_grad():
        before = run(model).logits
        inlay.attach(model, method)
        wanted = run(model.eval()).logits
        inlay.save_adapter(model, tmp_path)
        config = peft.PeftConfig.from_pretrained(str(tmp_path))
        config.task_type = "SEQ_2_SEQ_LM"
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path, config=config)
        torch.testing.assert_close(run(theirs).logits, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(run(inlay.detach(model)).logits, before)


def test_numbers_of_submodules_that_a_model_has_not_are_refused() -> None:
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    config.num_transformer_submodules = 1
    with pytest.raises(inlay.InlayError, match="num_transformer_submodules 1"):
        get_peft_model(t5(), config)
    small = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    config.num_transformer_submodules = 2
    with pytest.raises(inlay.InlayError, match="num_transformer_submodules 2"):
        get_peft_model(small, config)
