"""The runs that `compare_losses.py` trains: tiny random models, small data, and a run file each.

Everything is made from fixed seeds, and by transformers alone, so that it is the same whichever
commit of Inlay trains on it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = ["heart", "lungs", "clear", "normal", "large", "small", "effusion", "no", "seen", "left"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "dropout": 0.1},
    "dora": {"rank": 4},
    "ia3": {},
    "bottleneck": {},
    "prefix": {"tokens": 4},
    "prompt": {"tokens": 4},
    "p-tuning": {"tokens": 4},
    "bitfit": {},
    "norms": {},
    "full": {},
}
OF_THE_WHOLE_MODEL = ("prefix", "prompt", "p-tuning")
"""Methods that take no `targets`."""
STORAGES: dict[str, dict[str, Any]] = {
    "dense": {},
    "nf4": {"storage": "nf4"},
    "int8": {"storage": "int8"},
}
LLAMA, BERT, LLAVA = "llama", "bert", "llava"
GRPO: dict[str, Any] = {
    "rewards": [{"name": "regex", "pattern": "heart|lungs"}],
    "num_generations": 4,
    "max_completion_tokens": 6,
}
SEEN: dict[str, Any] = {"targets": ["language"], "max_length": 64}
TASKS: dict[str, dict[str, Any]] = {
    "sft": {"data": "answers"},
    "sft-packed": {"data": "answers", "packing": "bfd", "max_length": 32},
    "sft-cache-trunk": {"data": "answers", "layers": "1", "cache_trunk": True},
    "dpo": {"data": "pairs", "task": "dpo"},
    "orpo": {"data": "pairs", "task": "orpo"},
    "kto": {"data": "labelled", "task": "kto"},
    "grpo": {"data": "prompts", "task": "grpo", **GRPO},
    "reward": {"data": "pairs", "task": "reward"},
    "classify-single": {"model": BERT, "data": "single", "task": "classify"},
    "classify-multi": {"model": BERT, "data": "multi", "task": "classify"},
    "classify-regression": {"model": BERT, "data": "regression", "task": "classify"},
    "classify-tokens": {"model": BERT, "data": "tokens", "task": "classify"},
    "classify-causal": {"data": "single", "task": "classify"},
    "embed-pairs": {"model": BERT, "data": "similar", "task": "embed"},
    "embed-triplets": {"model": BERT, "data": "triplets", "task": "embed"},
    "embed-scored": {"model": BERT, "data": "scored", "task": "embed"},
    "image-sft": {"model": LLAVA, "data": "image_answers", **SEEN},
    "image-sft-tower": {
        "model": LLAVA, "data": "image_answers", "targets": ["language", "vision", "projector"],
    },
    "image-dpo": {"model": LLAVA, "data": "image_pairs", "task": "dpo", **SEEN},
    "image-orpo": {"model": LLAVA, "data": "image_pairs", "task": "orpo", **SEEN},
    "image-kto": {"model": LLAVA, "data": "image_labelled", "task": "kto", **SEEN},
}  # fmt: skip
"""Every kind of task, with the keys that make it."""
OPTIONS: dict[str, dict[str, Any]] = {
    "layer-inputs": {"activations": "layer-inputs"},
    "recompute-mlp": {"activations": "recompute-mlp"},
    "keep-products": {"activations": "keep-products"},
    "offload": {"activations": "offload"},
    "bfloat16": {"dtype": "bfloat16"},
    "stream-disk": {"stream": "disk", "storage": "nf4"},
    "head-nf4": {"head_storage": "nf4"},
    "adamw-8bit": {"optimizer": "adamw-8bit"},
    "cosine": {"scheduler": "cosine", "weight_decay": 0.01},
    "tokens": {"trainable_tokens": ["heart", "lungs"]},
    "head": {"targets": ["lm_head"]},
    "no-packing": {"packing": False},
    "rslora": {"rslora": True, "bias_training": "lora_only"},
}
"""Keys that a supervised LoRA is run with, one at a time."""
POCKET: dict[str, dict[str, Any]] = {
    "reports": {"data": "reports", "max_rows": 80},
    "arithmetic": {"data": "arithmetic", "max_rows": 80},
    "nf4": {"data": "reports", "max_rows": 80, "storage": "nf4"},
    "trunk": {"data": "reports", "max_rows": 80, "layers": "4-5"},
    "dora-int8": {"data": "reports", "max_rows": 80, "storage": "int8", "method": "dora"},
}
"""Runs on the embedded model, whose steps are long enough to compare speed."""


@dataclass(frozen=True)
class Case:
    """One run: `task/method/storage`, and its run file's keys but `output`.

    `model` and `data` are names in the folder that `make_inputs` writes, or built-in ones.
    """

    name: str
    keys: dict[str, Any]

    def run_file(self, inputs: Path) -> dict[str, Any]:
        """Return the keys with the paths of the model and the data."""
        return {**self.keys, "model": str(self.model(inputs)), "data": str(self.data(inputs))}

    def model(self, inputs: Path) -> Path:
        return found(inputs / self.keys["model"])

    def data(self, inputs: Path) -> Path:
        return found(inputs / f"{self.keys['data']}.jsonl")


def found(path: Path) -> Path:
    """Return a path that is there, or the name of what is built in."""
    return path if path.exists() else Path(path.name.removesuffix(".jsonl"))


def cases(full: bool) -> Iterator[Case]:
    """Yield every run.

    full: every task with every method on every storage; otherwise every task with every method
    on dense weights and with LoRA on each storage, and the supervised task with all of them.
    """
    for task, own in TASKS.items():
        for method, hyper in METHODS.items():
            for storage, held in STORAGES.items():
                if full or task == "sft" or storage == "dense" or method == "lora":
                    keys = {**defaults(task), **own, "method": method, **hyper, **held}
                    if method in OF_THE_WHOLE_MODEL:
                        keys.pop("targets", None)
                    yield Case(f"{task}/{method}/{storage}", keys)
    for name, own in OPTIONS.items():
        keys = {**defaults("sft"), "data": "answers", "method": "lora", "rank": 4, **own}
        yield Case(f"options/{name}", keys)
    for name, own in POCKET.items():
        keys = {**defaults("sft"), "model": "pocket", "batch_size": 4, **own}
        yield Case(f"pocket/{name}", keys)


def defaults(task: str) -> dict[str, Any]:
    """Return what the runs of a task have in common: 8 steps or so over two epochs."""
    written = {"generate_rows": 2, "generate_tokens": 4}
    return {
        "model": LLAMA,
        "learning_rate": 1e-2,
        "epochs": 2.0,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "split": [0.5, 0.25, 0.25],
        "log_every": 1,
        "save_every": 1000,
        "threads": 1,
        **({} if task == "grpo" else written),
    }


def make_inputs(folder: Path) -> None:
    """Write the models and the data of every case."""
    make_llama(folder / LLAMA)
    make_bert(folder / BERT)
    make_llava(folder / LLAVA)
    make_text_data(folder)
    make_image_data(folder)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_text_data(folder: Path, count: int = 32) -> None:
    """Write the rows of every task without images."""
    draw = random.Random(0)

    def some(low: int, high: int, words: list[str] = WORDS) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    first, second = WORDS[:5], WORDS[5:]
    answers, pairs, labelled, prompts, single = [], [], [], [], []
    multi, regression, tokens, similar, triplets, scored = [], [], [], [], [], []
    for i in range(count):
        prompt, good, bad = some(3, 7), some(2, 5, first), some(2, 5, second)
        words = prompt.split()
        back = " ".join(reversed(words))
        share = sum(word in first for word in words) / len(words)
        answers.append({"prompt": prompt, "completion": back})
        pairs.append({"prompt": prompt, "chosen": good, "rejected": bad})
        labelled.append({"prompt": prompt, "completion": (bad, good)[i % 2], "label": i % 2 == 1})
        prompts.append({"prompt": prompt, "word": words[0]})
        single.append({"text": (bad, good)[i % 2], "label": ("no", "yes")[i % 2]})
        multi.append({"text": prompt, "labels": [w for w in WORDS[:3] if w in words]})
        regression.append({"text": prompt, "label": round(share + i / 1000, 3)})
        tags = ["B-place" if word in WORDS[:2] else "O" for word in words]
        tokens.append({"tokens": words, "tags": tags})
        similar.append({"anchor": prompt, "positive": back})
        triplets.append({"anchor": prompt, "positive": back, "negative": bad})
        scored.append({"sentence1": prompt, "sentence2": good, "score": round(share, 3)})
    files = {
        "answers": answers, "pairs": pairs, "labelled": labelled, "prompts": prompts,
        "single": single, "multi": multi, "regression": regression, "tokens": tokens,
        "similar": similar, "triplets": triplets, "scored": scored,
    }  # fmt: skip
    for name, rows in files.items():
        write(folder / f"{name}.jsonl", rows)


def make_image_data(folder: Path, count: int = 24) -> None:
    """Write small pictures with a bright half, and the rows of every task about them."""
    import numpy
    from PIL import Image

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    draw = numpy.random.default_rng(0)
    answers, pairs, labelled = [], [], []
    for i in range(count):
        pixels = draw.integers(0, 90, (8, 8))
        right, wrong = ("left", "right") if i % 2 else ("right", "left")
        pixels[:, slice(0, 4) if right == "left" else slice(4, 8)] += 120
        name = f"pictures/{i:02}.png"
        Image.fromarray(pixels.astype("uint8")).save(folder / name)
        asked = {"image": name, "prompt": "Which half is bright?"}
        answers.append({**asked, "completion": right})
        pairs.append({**asked, "chosen": right, "rejected": wrong})
        good = i // 2 % 2 == 0
        labelled.append({**asked, "completion": right if good else wrong, "label": good})
    write(folder / "image_answers.jsonl", answers)
    write(folder / "image_pairs.jsonl", pairs)
    write(folder / "image_labelled.jsonl", labelled)


def words_tokenizer(special: list[str], unknown: str, processor: Any = None, **names: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special))
    if processor is not None:
        inner.post_processor = processor
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=unknown, **names)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def make_llama(folder: Path) -> None:
    """Save a random Llama of two layers with a word tokenizer; its projections have biases."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = words_tokenizer(
        ["<unk>", "<pad>", "</s>"], "<unk>", pad_token="<pad>", eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        **SMALL,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_bert(folder: Path) -> None:
    """Save a random Bert of two layers with a word tokenizer."""
    import torch
    from tokenizers import processors
    from transformers import BertConfig, BertModel

    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = words_tokenizer(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "[UNK]",
        template,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,
        **SMALL,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CHAT = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_llava(folder: Path) -> None:
    """Save a random Llava for pictures of 8 x 8 pixels, with its processor."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        ["Which half is bright?"] * 2,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", padding_side="right"
    )
    vision = CLIPVisionConfig(image_size=8, patch_size=2, initializer_range=0.2, **SMALL)
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "initializer_range": 0.2,
        "attention_bias": True,
        "mlp_bias": True,
        **SMALL,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    processor = {
        "patch_size": 2,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
