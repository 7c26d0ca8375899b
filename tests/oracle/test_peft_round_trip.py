"""HF PEFT is the oracle: what one library writes, the other reads, and both compute the same."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from inlay.checkpoint.adapter import load_adapter, save_adapter
from inlay.checkpoint.slots import slots
from inlay.methods.base import Method
from inlay.methods.dora import DoRA
from inlay.methods.ia3 import IA3
from inlay.methods.lora import LoRA
from inlay.methods.norms import NormTuning
from inlay.methods.p_tuning import PTuning
from inlay.methods.prefix import PrefixTuning
from inlay.methods.prompt import PromptTuning
from inlay.model.adapters.attach import attach
from inlay.model.adapters.registry import adapters
from inlay.model.merge.merge import merge
from inlay.model.stream.host import embedding_on_host

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # All come from peft's own code, or from transformers about peft's code.
        "`is_gradient_checkpointing` is deprecated:FutureWarning",
        "`past_key_values` is deprecated:FutureWarning",
        "Unsupported layer type:UserWarning",
        "Model has `tie_word_embeddings=True`:UserWarning",
        "Setting `save_embedding_layers`:UserWarning",
        # Ours, of what HF PEFT does not save.
        "the adapter in .* holds the embeddings that its prompt encoder computed:UserWarning",
    )
]

IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 0, 8]])
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def qwen2() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    config = transformers.BertConfig(**sizes, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()


BASES = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "bert": bert}


@dataclass(frozen=True)
class Case:
    """The same adapter in both libraries' words."""

    base: str
    method: Method
    config: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def peft_config(self) -> peft.PeftConfig:
        return getattr(peft, self.config["class"])(
            **{k: v for k, v in self.config.items() if k != "class"}
        )


def lora(**options: Any) -> dict[str, Any]:
    return {"class": "LoraConfig", "r": 4, "lora_alpha": 8, **options}


ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "lora": Case("llama", LoRA(rank=4, alpha=8), lora(target_modules="all-linear")),
    "rslora": Case(
        "llama",
        LoRA(rank=4, alpha=8, rslora=True),
        lora(target_modules=ATTENTION, use_rslora=True),
        {"targets": ATTENTION},
    ),
    "patterns": Case(
        "llama",
        LoRA(
            rank=4,
            alpha=8,
            rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 6},
            alpha_pattern={r".*\.0\.self_attn\.q_proj": 3},
        ),
        lora(
            target_modules=ATTENTION,
            rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 6},
            alpha_pattern={r".*\.0\.self_attn\.q_proj": 3},
        ),
        {"targets": ATTENTION},
    ),
    "embeddings": Case(
        "llama",
        LoRA(rank=4, alpha=8),
        lora(target_modules=["q_proj", "embed_tokens"]),
        {"targets": ["q_proj", "embed_tokens"]},
    ),
    "layers": Case(
        "llama",
        LoRA(rank=4, alpha=8),
        lora(target_modules=["q_proj"], layers_to_transform=[1]),
        {"targets": ["q_proj"], "layers": [1]},
    ),
    "head": Case(
        "llama",
        LoRA(rank=4, alpha=8),
        lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "bias": Case(
        "qwen2",
        LoRA(rank=4, alpha=8, bias_training="lora_only"),
        lora(target_modules=["q_proj"], bias="lora_only"),
        {"targets": ["q_proj"]},
    ),
    "all biases": Case(
        "qwen2",
        LoRA(rank=4, alpha=8, bias_training="all"),
        lora(target_modules=["q_proj"], bias="all"),
        {"targets": ["q_proj"]},
    ),
    "conv1d": Case(
        "gpt2",
        LoRA(rank=4, alpha=8),
        lora(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
        {"targets": ["c_attn", "mlp.c_proj"]},
    ),
    "classifier": Case(
        "bert",
        LoRA(rank=4, alpha=8),
        lora(target_modules=["query"], task_type="SEQ_CLS"),
        {"targets": ["query"], "modules_to_save": ["classifier"]},
    ),
    "dora": Case(
        "llama",
        DoRA(rank=4, alpha=8),
        lora(target_modules=[*ATTENTION, "embed_tokens"], use_dora=True),
        {"targets": [*ATTENTION, "embed_tokens"]},
    ),
    "dora on biases": Case(
        "qwen2",
        DoRA(rank=4, alpha=8),
        lora(target_modules=ATTENTION, use_dora=True),
        {"targets": ATTENTION},
    ),
    "dora on conv1d": Case(
        "gpt2",
        DoRA(rank=4, alpha=8),
        lora(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
        {"targets": ["c_attn"]},
    ),
    "ia3": Case(
        "qwen2",
        IA3(),
        {
            "class": "IA3Config",
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
    ),
    "ia3 on conv1d": Case(
        "gpt2",
        IA3(),
        {
            "class": "IA3Config",
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "prefix": Case(
        "llama",
        PrefixTuning(tokens=3),
        {"class": "PrefixTuningConfig", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    ),
    "prefix on gpt2": Case(
        "gpt2",
        PrefixTuning(tokens=3),
        {"class": "PrefixTuningConfig", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    ),
    "prompt": Case(
        "qwen2",
        PromptTuning(tokens=3),
        {"class": "PromptTuningConfig", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    ),
    "p-tuning": Case(
        "qwen2",
        PTuning(tokens=3, size=24),
        {
            "class": "PromptEncoderConfig",
            "num_virtual_tokens": 3,
            "encoder_hidden_size": 24,
            "task_type": "CAUSAL_LM",
        },
    ),
    "norms": Case(
        "bert",
        NormTuning(),
        {"class": "LNTuningConfig", "target_modules": ["LayerNorm"]},
    ),
    "norms on llama": Case(
        "llama",
        NormTuning(),
        {
            "class": "LNTuningConfig",
            "target_modules": ["input_layernorm", "post_attention_layernorm", "model.norm"],
            "task_type": "CAUSAL_LM",
        },
    ),
}
TORCH_ONLY = {"base_model_name_or_path", "auto_mapping", "task_type", "peft_version"}


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits at the text's own positions (peft also returns a prompt's)."""
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    return found[:, -IDS.shape[1] :] if found.ndim == 3 else found


def adapted_by_inlay(case: Case) -> torch.nn.Module:
    model = attach(BASES[case.base](), case.method, **case.ours)
    seed = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for slot in slots(model, "default"):
            slot.tensor.normal_(0, 0.5, generator=seed)
    return model


def adapted_by_peft(case: Case) -> peft.PeftModel:
    model = peft.get_peft_model(BASES[case.base](), case.peft_config).eval()
    seed = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5, generator=seed)
    return model


def saved_by_peft(model: peft.PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_what_inlay_writes_peft_reads(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = adapted_by_inlay(case)
    folder = save_adapter(model, tmp_path / "adapter")
    base = BASES[case.base]()
    assert largest_difference(logits(base), logits(model)) > 0.01, "the adapter must act"
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    assert largest_difference(logits(theirs), logits(model)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_what_peft_writes_inlay_reads(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = adapted_by_peft(case)
    folder = saved_by_peft(theirs, tmp_path)
    wanted = logits(theirs)
    base = BASES[case.base]()
    assert largest_difference(logits(base), wanted) > 0.01, "the adapter must act"
    load_adapter(base, folder)
    assert largest_difference(logits(base), wanted) < 1e-5
    assert any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("name", CASES)
def test_both_write_the_same_keys_and_shapes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    ours = load_file(
        save_adapter(adapted_by_inlay(case), tmp_path / "a") / "adapter_model.safetensors"
    )
    theirs = load_file(
        saved_by_peft(adapted_by_peft(case), tmp_path / "b") / "adapter_model.safetensors"
    )
    copies = {k for k in theirs if k.endswith("embed_tokens.base_layer.weight")}
    kept = {k for k in ours if k.startswith("prompt_encoder.")}  # what HF PEFT throws away
    assert bool(kept) == (name == "p-tuning")
    assert {k: v.shape for k, v in ours.items() if k not in kept} == {
        k: v.shape for k, v in theirs.items() if k not in copies
    }


@pytest.mark.parametrize("name", CASES)
def test_both_write_the_same_options(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    save_adapter(adapted_by_inlay(case), tmp_path / "a")
    saved_by_peft(adapted_by_peft(case), tmp_path / "b")
    ours, theirs = (
        json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in "ab"
    )
    assert set(ours) == set(theirs)
    placed = {"target_modules", "feedforward_modules", "modules_to_save", "layers_to_transform"}
    apart = {"encoder_hidden_size", *placed, *TORCH_ONLY}
    assert {k: v for k, v in ours.items() if k not in apart} == {
        k: v for k, v in theirs.items() if k not in apart
    }


@pytest.mark.parametrize("name", CASES)
def test_saving_and_loading_is_bit_equal(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = adapted_by_inlay(case)
    folder = save_adapter(model, tmp_path / "a")
    again = load_adapter(BASES[case.base](), folder)
    assert adapters(again)["default"].method == case.method
    for before, after in zip(slots(model, "default"), slots(again, "default"), strict=True):
        assert before.key == after.key
        assert torch.equal(before.tensor, after.tensor)
    assert torch.equal(logits(model), logits(again))
    once_more = save_adapter(again, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / file).read_bytes() == (once_more / file).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_trained_by_peft_together_or_apart(tied: bool, tmp_path: Path) -> None:
    config = lora(
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"] if tied else ["embed_tokens", "lm_head"],
        ensure_weight_tying=tied,
    )
    theirs = adapted_by_peft(Case("llama", LoRA(), config))
    folder = saved_by_peft(theirs, tmp_path)
    base = load_adapter(llama(), folder)
    assert largest_difference(logits(base), logits(theirs)) < 1e-5
    own = {
        id(s.tensor)
        for s in slots(base, "default")
        if s.key.endswith(("lm_head.weight", "embed_tokens.weight"))
    }
    assert len(own) == (1 if tied else 2)


def test_a_regex_and_an_exclusion_mean_what_they_mean_in_peft(tmp_path: Path) -> None:
    config = lora(target_modules=r".*\.(q|k)_proj", exclude_modules=["layers.0.self_attn.k_proj"])
    theirs = adapted_by_peft(Case("llama", LoRA(), config))
    base = load_adapter(llama(), saved_by_peft(theirs, tmp_path))
    assert len(adapters(base)["default"].found.names) == 3
    assert largest_difference(logits(base), logits(theirs)) < 1e-5


def test_patterns_whose_order_counts_survive_peft_sorting_them(tmp_path: Path) -> None:
    pattern = {"q_proj": 2, ".*proj": 3}
    method = LoRA(rank=4, alpha=8, rank_pattern=pattern)
    model = adapted_by_inlay(Case("llama", method, {}, {"targets": ATTENTION}))
    folder = save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()
    assert largest_difference(logits(theirs), logits(model)) < 1e-5
    assert adapters(load_adapter(llama(), folder))["default"].method == method


@pytest.mark.parametrize("name", ["lora", "embeddings", "all biases", "conv1d", "dora", "ia3"])
def test_merged_models_load_in_plain_transformers(name: str, tmp_path: Path) -> None:
    model = adapted_by_inlay(CASES[name])
    wanted = logits(model)
    merge(model)
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(plain) is type(copy.deepcopy(model))
    assert largest_difference(logits(plain), wanted) < 1e-4


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_no_layer_has_are_none(bias: str, tmp_path: Path) -> None:
    """HF PEFT takes the option where there is nothing to train."""
    case = Case("llama", LoRA(), lora(target_modules=["q_proj"], bias=bias))
    theirs = adapted_by_peft(case)
    ours = load_adapter(llama(), saved_by_peft(theirs, tmp_path))
    assert largest_difference(logits(ours), logits(theirs)) < 1e-5


def test_a_copy_of_an_embedding_is_held_against_one_on_the_host(tmp_path: Path) -> None:
    """HF PEFT writes the embedding beside an adapter that targets it."""

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": False})
        return transformers.LlamaForCausalLM(config).eval()

    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    theirs = peft.get_peft_model(base(), config).eval()
    ours = load_adapter(embedding_on_host(base(), "cpu"), saved_by_peft(theirs, tmp_path))
    assert largest_difference(logits(ours), logits(theirs)) < 1e-5
