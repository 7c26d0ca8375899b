"""Tiny models, adapters and rows that stand in for those that other projects' tests fetch.

They are written as the hub's cache lies on a disk, so that nothing of a library is replaced to find
them: set `HF_HOME` to the folder and `HF_HUB_OFFLINE` before a library is imported, and every
`from_pretrained` by the hub's names works. Each is random, always the same, with the tokenizer of
the model that Inlay embeds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

POCKET = Path(__file__).parents[2] / "src" / "inlay" / "model" / "pocket"
VOCABULARY = 4104
"""The tokenizer's 4,096, and some rows that it does not use."""
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GEMMA = {**SMALL, "head_dim": 4, "sliding_window": 16}
NO_GROUPS = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 512,
                        "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0,
                        "pad_token_id": 1}  # fmt: skip
OPT = {**NO_GROUPS, "ffn_dim": 32, "word_embed_proj_dim": 16}
LARGE_OPT = {**OPT, "num_hidden_layers": 12}
T5: dict[str, Any] = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 2, "num_heads": 4,
                      "vocab_size": VOCABULARY, "pad_token_id": 1, "eos_token_id": 0,
                      "decoder_start_token_id": 1}  # fmt: skip
BART: dict[str, Any] = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
                        "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": VOCABULARY,
                        "max_position_embeddings": 512, "pad_token_id": 1, "bos_token_id": 0,
                        "eos_token_id": 2, "decoder_start_token_id": 2,
                        "forced_eos_token_id": 2}  # fmt: skip
CLIP: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16,
                        "num_hidden_layers": 2, "num_attention_heads": 4,
                        "vocab_size": VOCABULARY, "max_position_embeddings": 77}  # fmt: skip
WHISPER: dict[str, Any] = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
                           "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                           "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
                           "vocab_size": VOCABULARY, "num_mel_bins": 80,
                           "max_source_positions": 60, "max_target_positions": 40,
                           "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
                           "decoder_start_token_id": 0, "suppress_tokens": None,
                           "begin_suppress_tokens": None}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

Model = tuple[str, dict[str, Any]]
MODELS: dict[str, Model] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bigscience/bloomz-560m": ("BloomForCausalLM", {**NO_GROUPS, "n_layer": 2, "n_head": 4}),
    "hf-internal-testing/tiny-random-BertModel": ("BertLMHeadModel", NO_GROUPS),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", GEMMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", SMALL),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", LARGE_OPT),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModelWithProjection", CLIP),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", SMALL),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        BART,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        NO_GROUPS,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertForPreTraining", NO_GROUPS),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {**NO_GROUPS, "n_layer": 2, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", NO_GROUPS),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", NO_GROUPS),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        {**GPT2, "rotary_dim": 4, "tie_word_embeddings": False},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", NO_GROUPS),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", SMALL),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        NO_GROUPS,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", NO_GROUPS),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (
        "T5ForConditionalGeneration",
        T5,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        T5,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "Qwen/Qwen2-0.5B": ("Qwen2ForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        {**SMALL, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        {**SMALL, "head_dim": 4, "intermediate_size_mlp": 32, "num_local_experts": 4,
         "num_experts_per_tok": 1},
    ),
    "trl-internal-testing/tiny-LlamaForCausalLM-3.2": ("LlamaForCausalLM", SMALL),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        SMALL,
    ),
    "trl-internal-testing/tiny-MistralForCausalLM-0.2": ("MistralForCausalLM", SMALL),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", SMALL),
    "trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5": (
        "Qwen2ForSequenceClassification",
        {**SMALL, "num_labels": 1},
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {**SMALL, "head_dim": 4}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeForCausalLM",
        {**SMALL, **EXPERTS, "head_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", SMALL),
}  # fmt: skip
"""The hub's names -> the class, and what its configuration is made of."""

REVISIONS = {"peft-internal-testing/tiny-random-BertModel": ("v2.0.0",)}
"""Other revisions of a model, with other values."""

ADAPTERS = {
    "peft-internal-testing/gpt2-lora-random": ("gpt2", "AutoModelForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/opt-tokenizer-revision": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModelForCausalLM",
        "CAUSAL_LM",
    ),
    "peft-internal-testing/tiny-random-BertModel-lora": (
        "hf-internal-testing/tiny-random-BertModel",
        "AutoModelForCausalLM",
        "CAUSAL_LM",
    ),
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModelForCausalLM",
        "CAUSAL_LM",
    ),
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModelForCausalLM",
        "CAUSAL_LM",
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "hf-internal-testing/tiny-random-gpt2",
        "AutoModelForTokenClassification",
        "TOKEN_CLS",
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModel",
        "FEATURE_EXTRACTION",
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModelForQuestionAnswering",
        "QUESTION_ANS",
    ),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": (
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
    ),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        "stand-in/whisper",
        "WhisperForConditionalGeneration",
        None,
    ),
}
"""The hub's names -> the base, the class that loads it, the task."""

MORE_TOKENS = {
    "peft-internal-testing/opt-tokenizer-revision": 20,
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": 20,
}
"""How many tokens were added before an adapter was trained; its tokenizer lies beside it."""
ADAPTER_REVISIONS = {
    "peft-internal-testing/opt-tokenizer-revision": "my-revision",
    "peft-internal-testing/tiny-random-BertModel-lora": "v1.2.3",
}

TURNS = [(f"Question {i} about pears?", f"Answer {i}, a pear.", f"No {i}.") for i in range(17)]
"""A prompt, a better and a worse answer."""
ROWS: dict[str, list[dict[str, Any]]] = {
    "standard_language_modeling": [{"text": f"{q} {a}"} for q, a, _ in TURNS],
    "standard_prompt_only": [{"prompt": q} for q, _, _ in TURNS],
    "standard_prompt_completion": [{"prompt": q, "completion": a} for q, a, _ in TURNS],
    "standard_preference": [{"prompt": q, "chosen": a, "rejected": r} for q, a, r in TURNS],
    "standard_implicit_prompt_preference": [
        {"chosen": f"{q} {a}", "rejected": f"{q} {r}"} for q, a, r in TURNS
    ],
    "standard_unpaired_preference": [
        {"prompt": q, "completion": r if i % 2 else a, "label": i % 2 == 0}
        for i, (q, a, r) in enumerate(TURNS)
    ],
}
"""Rows of TRL's tests by their configuration's name."""


def build(home: Path) -> None:
    """Write the stand-ins into a new cache, and let every library look there.

    Call it before torch's libraries are imported.
    """
    os.environ.update({"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    import transformers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(POCKET))
    models = {**MODELS, "stand-in/whisper": ("WhisperForConditionalGeneration", WHISPER)}
    for number, (name, (class_name, options)) in enumerate(models.items()):
        for offset, revision in enumerate(("main", *REVISIONS.get(name, ()))):
            torch.manual_seed(number + 1000 * offset)
            cls: Any = getattr(transformers, class_name)
            folder = snapshot(home, name, revision)
            spread(cls(cls.config_class(**options))).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    for name, (base, class_name, task) in ADAPTERS.items():
        folder = snapshot(home, name, ADAPTER_REVISIONS.get(name, "main"))
        write_adapter(folder, base, getattr(transformers, class_name), task, MORE_TOKENS.get(name))


def snapshot(home: Path, name: str, revision: str) -> Path:
    """Return the folder of one revision in the hub's cache, known by its name."""
    commit = f"{abs(hash_of(name + revision)):040x}"[:40]
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def hash_of(text: str) -> int:
    """Return a number of 160 bits for a text, the same every time."""
    import hashlib

    return int(hashlib.sha1(text.encode()).hexdigest(), 16)


def spread(model: Any) -> Any:
    """Make a random model's outputs differ from one input to the next, as a trained one's do."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name.lower():
                parameter.normal_(std=0.1)
    model.tie_weights()
    return model


def write_adapter(folder: Path, base: str, cls: Any, task: str | None, more: int | None) -> None:
    """Write an adapter with HF PEFT."""
    import peft
    from transformers import AutoTokenizer

    model = cls.from_pretrained(base)
    if more:
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([f"<more {i}>" for i in range(more)])
        model.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(folder)
    config = peft.LoraConfig(
        task_type=task, init_lora_weights=False, target_modules=TARGETS.get(base)
    )
    peft.get_peft_model(model, config).save_pretrained(folder)


TARGETS = {"stand-in/whisper": ["q_proj", "v_proj"]}


def load_dataset(name: str, configuration: str | None = None, split: str | None = None) -> Any:
    """Return rows in the place of `datasets.load_dataset`."""
    from datasets import Dataset, DatasetDict

    if name == "ybelkada/english_quotes_copy":
        rows = Dataset.from_list([{"quote": q, "author": a} for q, a, _ in TURNS])
    else:
        rows = Dataset.from_list(ROWS[configuration or ""])
    return rows if split else DatasetDict({"train": rows, "test": rows.select(range(2))})


def use_rows() -> None:
    """Let `from datasets import load_dataset` give the rows above."""
    import datasets

    datasets.load_dataset = load_dataset
