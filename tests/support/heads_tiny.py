"""Tiny encoders and causal models, rows with labels, and runs over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from train_tiny import WORDS, make_model, make_run
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from inlay.run.config import RunConfig
from inlay.tasks.config import load_config

PLACES = ("heart", "lungs")
"""Words that the tags of `make_tagged` call a place."""


def make_encoder(folder: Path, pooler: bool = True, words: Sequence[str] = WORDS) -> Path:
    """Save a random Bert with a word tokenizer that begins a row with [CLS]."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        [" ".join(words)], trainers.WordLevelTrainer(special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]",
        cls_token="[CLS]", sep_token="[SEP]", model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    config = BertConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count: int) -> list[list[str]]:
    """Return rows of words, each its own, of many lengths."""
    return [
        [WORDS[(i * 3 + k * (1 + i // 10)) % len(WORDS)] for k in range(3 + i % 5)]
        for i in range(count)
    ]


def make_rows(kind: str, count: int = 120) -> list[dict[str, Any]]:
    """Return rows whose label follows from the words."""
    makers = {"single": half, "multi": groups, "regression": share, "tokens": places}
    return [{**makers[kind](i), "id": i} for i in range(count)]


def half(i: int) -> dict[str, Any]:
    """Words of the first half of the vocabulary, or of the second."""
    words = [WORDS[(i // 2 + k * (1 + i // 10)) % 5 + 5 * (i % 2)] for k in range(3 + i % 5)]
    return {"text": " ".join(words), "label": ("yes", "no")[i % 2]}


def groups(i: int) -> dict[str, Any]:
    """Words of some of three groups."""
    chosen = [g for g in range(3) if (i % 7 + 1) >> g & 1]
    words = [WORDS[3 * g + (i // 7 + k) % 3] for k in range(2) for g in chosen]
    return {"text": " ".join(words), "labels": [f"group {g}" for g in chosen]}


def share(i: int) -> dict[str, Any]:
    """Words of which some are of the first half, and how many more than of the second."""
    words = texts(i + 1)[i]
    first = sum(WORDS.index(word) < 5 for word in words)
    return {"text": " ".join(words), "label": round(2 * first / len(words) - 1, 3) + 0.001}


def places(i: int) -> dict[str, Any]:
    """Words of which some name a place, and what follows one."""
    words = texts(i + 1)[i]
    tags = ["O"] * len(words)
    for n, word in enumerate(words):
        if word in PLACES:
            tags[n] = "B-place"
            if n + 1 < len(words) and words[n + 1] not in PLACES:
                tags[n + 1] = "I-place"
    return {"tokens": words, "tags": tags}


def make_classify(
    folder: Path, output: str = "out", *, kind: str = "single", base: str = "encoder",
    **changes: Any,
) -> RunConfig:  # fmt: skip
    """Return a short run on labels over the model and data in this folder."""
    if not (folder / base).is_dir():
        (make_encoder if base == "encoder" else make_model)(folder / base)
    if not (folder / f"{kind}.jsonl").is_file():
        write(folder / f"{kind}.jsonl", make_rows(kind))
    return config_of("classify", folder, f"{kind}.jsonl", base, output, changes)


def make_preferences(path: Path, rows: int = 60) -> Path:
    """Write preferences: a word of the first half of the vocabulary, rather than of the second."""
    found = [
        {
            "prompt": " ".join(words),
            "chosen": " ".join(WORDS[(i + k) % 5] for k in range(2 + i % 3)),
            "rejected": " ".join(WORDS[5 + (i + k) % 5] for k in range(2 + i % 2)),
        }
        for i, words in enumerate(texts(rows))
    ]
    return write(path, found)


def make_reward(
    folder: Path, output: str = "out", *, base: str = "causal", **changes: Any
) -> RunConfig:
    """Return a short run on preferences for a reward model."""
    if not (folder / base).is_dir():
        (make_encoder if base == "encoder" else make_model)(folder / base)
    if not (folder / "preferences.jsonl").is_file():
        make_preferences(folder / "preferences.jsonl")
    return config_of("reward", folder, "preferences.jsonl", base, output, changes)


def make_similar(kind: str, count: int = 60) -> list[dict[str, Any]]:
    """Return texts that belong together: the same words in another order."""
    found: list[dict[str, Any]] = []
    for i, words in enumerate(texts(count)):
        other = texts(count)[(i + 7) % count]
        row = {"anchor": " ".join(words), "positive": " ".join(reversed(words))}
        if kind == "triplets":
            row["negative"] = " ".join(other)
        if kind == "scored_pairs":
            shared = len({*words} & {*other}) / len({*words, *other})
            row = {"sentence1": " ".join(words), "sentence2": " ".join(other), "score": shared}
        found.append(row)
    return found


def make_embed(
    folder: Path, output: str = "out", *, kind: str = "pairs", base: str = "encoder", **changes: Any
) -> RunConfig:
    """Return a short run on texts that belong together."""
    if not (folder / base).is_dir():
        (make_encoder if base == "encoder" else make_model)(folder / base)
    if not (folder / f"{kind}.jsonl").is_file():
        write(folder / f"{kind}.jsonl", make_similar(kind))
    return config_of("embed", folder, f"{kind}.jsonl", base, output, changes)


def make_any(folder: Path, output: str, **changes: Any) -> RunConfig:
    """Return a short run of any task."""
    makers: dict[str, Any] = {
        "classify": make_classify, "reward": make_reward, "embed": make_embed,
    }  # fmt: skip
    make = makers.get(changes.get("task", "sft"))
    if make is None:
        return make_run(folder, output, **changes)
    return make(folder, output, **{k: v for k, v in changes.items() if k != "task"})


def config_of(
    task: str, folder: Path, data: str, base: str, output: str, changes: dict[str, Any]
) -> RunConfig:
    run: dict[str, Any] = {
        "task": task, "model": str(folder / base), "data": str(folder / data),
        "output": str(folder / output), "rank": 4, "learning_rate": 1e-2, "epochs": 2.0,
        "batch_size": 4, "gradient_accumulation": 2, "log_every": 2, "save_every": 4,
        "threads": 1, "split": [0.6, 0.2, 0.2],
    }  # fmt: skip
    run |= changes
    if run.get("method", "lora") != "lora":
        run.pop("rank")
    return load_config(None, run)
