"""A tiny base model, a few rows and a run over them, for the tests of training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inlay.errors import UsageError
from inlay.methods.catalog import build_method
from inlay.model.load.pretrained import load
from inlay.run.config import RunConfig
from inlay.tasks import TASKS
from inlay.tasks.config import load_config
from inlay.train.output.folder import RunFolder
from inlay.train.processes.share import Share
from inlay.train.run import TrainResult
from inlay.train.stages import Stages

WORDS = ["heart", "lungs", "clear", "normal", "large", "small", "effusion", "no", "seen", "left"]


def make_model(folder: Path) -> Path:
    """Save a random Llama with a word tokenizer."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<pad>", "</s>"]
    tokenizer.train_from_iterator(
        [" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_data(path: Path, rows: int = 30) -> Path:
    """Write rows whose completion follows from the prompt."""
    lines = []
    for i in range(rows):
        words = [WORDS[(i * 3 + k * (1 + i % 4)) % len(WORDS)] for k in range(3 + i % 5)]
        lines.append({"prompt": " ".join(words), "completion": " ".join(reversed(words))})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def make_pairs(path: Path, rows: int = 30) -> Path:
    """Write preferences: words of the first half of the vocabulary, rather than of the second."""
    lines = []
    for i in range(rows):
        places = [(i + k * (1 + i % 3)) % 5 for k in range(2 + i % 4)]
        prompt = " ".join(WORDS[(i * 3 + k) % len(WORDS)] for k in range(3 + i % 5))
        chosen, rejected = (" ".join(WORDS[at + p] for p in places) for at in (0, 5))
        lines.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def make_labelled(path: Path, rows: int = 40) -> Path:
    """Write labelled rows: words of the first half of the vocabulary are desirable."""
    lines = []
    for i in range(rows):
        first = 0 if i % 5 < 3 else 5
        places = [(i + k * (1 + i % 3)) % 5 for k in range(2 + i % 4)]
        prompt = " ".join(WORDS[(i * 3 + k) % len(WORDS)] for k in range(3 + i % 7))
        completion = " ".join(WORDS[first + p] for p in places)
        lines.append({"prompt": prompt, "completion": completion, "label": first == 0})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def make_prompts(path: Path, rows: int = 30) -> Path:
    """Write prompts, each with the word that its answer should hold."""
    lines = []
    for i in range(rows):
        words = [WORDS[(i * 3 + k * (1 + i % 4)) % len(WORDS)] for k in range(3 + i % 5)]
        lines.append({"prompt": " ".join(words), "word": WORDS[i % 2], "number": i})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


DATA = {"sft": "data.jsonl", "kto": "labelled.jsonl", "grpo": "prompts.jsonl"}
"""The file of each task's rows; pairs for the others."""
GRPO: dict[str, Any] = {
    "rewards": [{"name": "regex", "pattern": "heart|lungs"}],
    "num_generations": 4,
    "max_completion_tokens": 6,
}
"""What a run on rewards needs beside the others' keys."""


def make_run(folder: Path, output: str = "out", **changes: Any) -> RunConfig:
    """Return a run of 12 steps over 23 rows on the model and data in this folder."""
    if not (folder / "model").is_dir():
        make_model(folder / "model")
        make_data(folder / "data.jsonl")
        make_pairs(folder / "pairs.jsonl")
        make_labelled(folder / "labelled.jsonl")
        make_prompts(folder / "prompts.jsonl")
    data = DATA.get(changes.get("task", "sft"), "pairs.jsonl")
    run: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / data),
        "output": str(folder / output),
        "dropout": 0.1,
        "rank": 4,
        "learning_rate": 1e-2,
        "epochs": 2.0,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "log_every": 2,
        "save_every": 4,
        "generate_rows": 2,
        "generate_tokens": 4,
        "threads": 1,
    }
    if changes.get("task") == "grpo":
        run = {k: v for k, v in run.items() if not k.startswith("generate_")} | GRPO
    run |= changes
    if run.get("method", "lora") != "lora":
        run = {k: v for k, v in run.items() if k not in ("dropout", "rank")} | changes
    return load_config(None, run)


PREFER = {"beta": 1.0, "learning_rate": 3e-2}
OF_TASK: dict[str, dict[str, Any]] = {
    "dpo": PREFER,
    "orpo": PREFER,
    "kto": {**PREFER, "split": [0.6, 0.2, 0.2]},
    "grpo": {"learning_rate": 3e-2},
}
"""The keys under which 12 steps teach each task something."""


def make_task(task: str, folder: Path, output: str = "out", **changes: Any) -> RunConfig:
    """Return a run of a task on a model and data that are tiny."""
    return make_run(folder, output, **{"task": task, **OF_TASK[task], **changes})


KINDS: list[dict[str, Any]] = [
    {"storage": "nf4", "dtype": "bfloat16"},
    {"targets": ["lm_head"]},
    {"activations": "layer-inputs"},
    {"method": "prefix", "tokens": 4},
    {"method": "dora"},
    {"method": "full", "learning_rate": 1e-2},
    {"storage": "nf4", "stream": "disk"},
]
"""Storages, methods and options that every task learns with."""


@contextmanager
def one_model(trainer: ModuleType) -> Generator[None]:
    """Fail where a trainer of TRL loads a second model."""

    def second_model(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a second model is loaded: {args}, {kwargs}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "create_model_from_path", second_model)
        yield


def what_is_left(config: RunConfig, result: TrainResult) -> tuple[dict[str, Any], str]:
    """Check that a run leaves what a supervised one does; return its run.json and its page."""
    output = Path(config.output)
    assert {p.name for p in output.iterdir()} == {
        "adapter", "checkpoints", "metrics.jsonl", "report.html", "run.json",
    }  # fmt: skip
    run = json.loads((output / "run.json").read_text())
    assert run["task"] == run["config"]["task"] == config.task
    assert run["memory"]["planned_bytes"] > 0
    assert result.model is not None
    assert "forward" not in vars(result.model)
    assert not result.model.training
    return run, (output / "report.html").read_text()


def check_refused(sentence: str, **keys: Any) -> None:
    """Check that a run of these keys is refused with a sentence."""
    with pytest.raises(UsageError) as caught:
        load_config(None, {"model": "m", "data": "d", "output": "o", **keys})
    assert sentence in str(caught.value)


def silence(model: str, layer: int) -> None:
    """Zero the projection behind a block's attention, so that no gradient passes through it."""
    loaded, tokenizer = load(model)
    with torch.no_grad():
        loaded.model.layers[layer].self_attn.o_proj.weight.zero_()
    loaded.save_pretrained(model)
    tokenizer.save_pretrained(model)


def adapter_hash(output: str | Path) -> str:
    """Return the hash of a run's trained adapter."""
    return hashlib.sha256(
        (Path(output) / "adapter/adapter_model.safetensors").read_bytes()
    ).hexdigest()


def losses_of(output: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, timings left out."""
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    timings = ("seconds", "tokens_per_second", "memory_bytes")
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]


def broken_at(
    monkeypatch: pytest.MonkeyPatch, trainer: type[Any], step: int, what: float | BaseException
) -> None:
    """Multiply a trainer's loss of a step, or raise in it."""
    compute = trainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        if self.state.global_step + 1 != step:
            return loss
        if isinstance(what, BaseException):
            raise what
        return loss * what

    monkeypatch.setattr(trainer, "compute_loss", broken)


def stages_of(config: RunConfig) -> Stages[Any]:
    """Return the stages of a run, none of them gone through."""
    method = build_method(config.method, config.hyperparameters)
    share = Share(config.batch_size, config.gradient_accumulation)
    return Stages(TASKS[config.task].run(config), method, RunFolder(Path(config.output)), share)


def trainer_on(config: RunConfig, model: Any, tokenizer: Any) -> Any:
    """Return a run's trainer on a model with an adapter; nothing is held out."""
    stages = stages_of(config)
    tokens, _ = stages.tokens()
    tokens = replace(tokens, validation=[])
    setup = stages.setup(model, tokenizer, tokens, {"learning_rate": {"value": 1e-3}})
    stages.task.keep_features(setup)
    with stages.task.reading():
        return stages.task.trainer(setup)
