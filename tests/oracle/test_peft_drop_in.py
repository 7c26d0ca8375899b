"""The same script with `inlay.peft` in HF PEFT's place: the same seed, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from inlay.peft import PeftModel, get_peft_model

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # All from peft's own code, or from transformers about peft's code.
        "`is_gradient_checkpointing` is deprecated:FutureWarning",
        "`past_key_values` is deprecated:FutureWarning",
        "Setting `save_embedding_layers`:UserWarning",
        "Model has `tie_word_embeddings=True`:UserWarning",
        "Unsupported layer type:UserWarning",
        "Position ids are not supported:UserWarning",
    )
]

IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 0, 8]])
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    quiet = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    config = transformers.GPT2Config(**sizes, **quiet, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    config = transformers.BertConfig(**SIZES, **quiet, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, **options)


CASES: dict[str, tuple[Any, Any]] = {
    "default targets": (llama, lambda: lora(task_type="CAUSAL_LM")),
    "not a no-op": (llama, lambda: lora(init_lora_weights=False)),
    "gaussian": (llama, lambda: lora(init_lora_weights="gaussian", target_modules="all-linear")),
    "rslora": (llama, lambda: lora(use_rslora=True, init_lora_weights=False, lora_alpha=3)),
    "dora": (llama, lambda: lora(use_dora=True, init_lora_weights=False)),
    "embedding": (
        llama,
        lambda: lora(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False),
    ),
    "patterns": (
        llama,
        lambda: lora(
            target_modules=r".*\.(q|v)_proj",
            rank_pattern={"v_proj": 2},
            alpha_pattern={"0.self_attn.q_proj": 32},
            init_lora_weights=False,
        ),
    ),
    "layers": (
        llama,
        lambda: lora(
            target_modules=["q_proj", "up_proj"], layers_to_transform=[1], init_lora_weights=False
        ),
    ),
    "exclude": (
        llama,
        lambda: lora(
            target_modules=["q_proj", "up_proj"],
            exclude_modules=["layers.0.self_attn.q_proj"],
            init_lora_weights=False,
        ),
    ),
    "head": (llama, lambda: lora(modules_to_save=["lm_head"], init_lora_weights=False)),
    "conv1d": (gpt2, lambda: lora(fan_in_fan_out=True, init_lora_weights=False)),
    "classifier": (bert, lambda: lora(task_type="SEQ_CLS", init_lora_weights=False)),
    "ia3": (llama, lambda: IA3Config(init_ia3_weights=False)),
    "ia3 ones": (gpt2, lambda: IA3Config(fan_in_fan_out=True)),
    "norms": (llama, lambda: LNTuningConfig()),
}


def same_start(build: Any, config: PeftConfig, other: PeftConfig) -> tuple[PeftModel, Any]:
    ours, theirs = build(), build()
    torch.manual_seed(7)
    ours = get_peft_model(ours, config)
    torch.manual_seed(7)
    return ours, peft.get_peft_model(theirs, other)


LOSES_PROMPTS = Version(transformers.__version__) >= Version("5.24")
"""HF PEFT 0.21 hands prompts over as `past_key_values`; from 5.24 on generation ignores those."""


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def labels(build: Any) -> torch.Tensor:
    return torch.tensor([0, 2]) if build is bert else IDS


@pytest.mark.parametrize("name", CASES)
def test_the_same_seed_gives_the_same_model_loss_and_gradients(name: str) -> None:
    build, config = CASES[name]
    ours, theirs = same_start(build, config(), config())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    trained = ours.get_nb_trainable_parameters()
    assert trained == theirs.get_nb_trainable_parameters()
    norms = []
    for model in (ours, theirs):
        model.train()
        loss = model(input_ids=IDS, labels=labels(build)).loss
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        norms.append((float(loss.detach()), float(torch.cat(grads).norm())))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_what_is_saved_and_the_other_way_round(name: str, tmp_path: Path) -> None:
    build, config = CASES[name]
    ours, theirs = same_start(build, config(), config())
    wanted = logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read = peft.PeftModel.from_pretrained(build(), tmp_path / "ours")
    torch.testing.assert_close(logits(read), wanted, rtol=1e-4, atol=1e-5)
    for folder in ("ours", "theirs"):
        back = PeftModel.from_pretrained(build(), tmp_path / folder)
        torch.testing.assert_close(logits(back), wanted, rtol=1e-4, atol=1e-5)
        assert back.get_nb_trainable_parameters()[0] == 0
        assert back.peft_config["default"].task_type == config().task_type


PROMPTS: dict[str, Any] = {
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "sampled": lambda: PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_start_the_same_and_are_read_by_peft(name: str, tmp_path: Path) -> None:
    ours, theirs = same_start(llama, PROMPTS[name](), PROMPTS[name]())
    length = IDS.shape[1]
    torch.testing.assert_close(logits(ours), logits(theirs)[:, -length:], rtol=1e-4, atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(read), logits(theirs), rtol=1e-4, atol=1e-5)
    back = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(back), logits(ours))
    generated = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    said = ours.generate(input_ids=IDS, attention_mask=mask, **generated)
    assert torch.equal(said, greedy(theirs.eval(), 4))
    if not LOSES_PROMPTS:
        assert torch.equal(said, theirs.generate(input_ids=IDS, attention_mask=mask, **generated))


@torch.no_grad()
def greedy(model: Any, tokens: int) -> torch.Tensor:
    """Return the likeliest answer by whole passes, without a cache."""
    ids = IDS
    for _ in range(tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_a_bf16_base_starts_from_the_values_that_peft_rounds_to_it() -> None:
    ours, theirs = same_start(lambda: llama().bfloat16(), lora(), lora())
    mine = [p for p in ours.parameters() if p.requires_grad]
    other = [p for p in theirs.parameters() if p.requires_grad]
    assert all(a.dtype == b.dtype == torch.float32 for a, b in zip(mine, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_generation_is_that_of_peft() -> None:
    ours, theirs = same_start(llama, lora(init_lora_weights=False), lora(init_lora_weights=False))
    asked: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": 0,
        "attention_mask": torch.ones_like(IDS),
    }  # fmt: skip
    assert torch.equal(
        ours.eval().generate(input_ids=IDS, **asked), theirs.eval().generate(input_ids=IDS, **asked)
    )
