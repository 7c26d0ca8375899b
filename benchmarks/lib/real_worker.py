"""A contestant's whole run on real rows, which pauses after every few optimiser steps.

Started by `turns.Worker`; the first request holds the run. A run is started, goes through its
first steps and pauses; each further request lets it take some more; the last one lets it end.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from benchmarks.lib.machine import THREADS
from benchmarks.lib.shapes import ALPHA, RANK
from benchmarks.lib.turns import Parent, PeakMemory, serve
from inlay.data.rows import Rows
from inlay.data.text_reader import TextReader
from inlay.data.tokens import Encoded, encode
from inlay.evaluate.losses import losses
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.train.output.events import Event
from inlay.train.rows import RunRows, rows_of_run
from inlay.train.run import train
from inlay.train.trl import training_template


class Pauses:
    """Stops a run at the end of its turn and continues it when the next turn begins."""

    def __init__(self, parent: Parent, spec: dict[str, Any]) -> None:
        self.parent = parent
        self.left: int = spec["warm_up"]
        self.total: int = spec["steps"]
        self.taken = 0
        self.memory: PeakMemory | None = None
        self.started = time.perf_counter()

    def begins(self) -> None:
        """Record the memory held by the model and its adapter."""
        self.memory = PeakMemory()
        self.started = time.perf_counter()

    def step(self) -> None:
        """Count an optimiser step; pause after the last one of a turn."""
        self.taken += 1
        self.left -= 1
        if self.left and self.taken < self.total:
            return
        assert self.memory is not None
        self.parent.answer(
            seconds=time.perf_counter() - self.started,
            steps_taken=self.taken,
            peak_bytes=self.memory.above(),
        )
        self.left = self.parent.wait()["steps"]
        self.started = time.perf_counter()


def work(parent: Parent, spec: dict[str, Any]) -> None:
    """Run one side from beginning to end."""
    torch.set_num_threads(THREADS)
    config = run_config(spec)
    run = peer if spec["contestant"] == "TRL + peft" else ours
    loss, facts = run(config, spec, Pauses(parent, spec))
    parent.answer(held_out_loss=loss, **facts)


def run_config(spec: dict[str, Any]) -> RunConfig:
    """Return the run's configuration, as `inlay train` would read it."""
    return load_config(
        overrides={
            "model": spec["base"], "data": spec["train"], "eval_data": spec["held_out"],
            "output": spec["output"], "rank": RANK, "alpha": ALPHA, "epochs": 1,
            "batch_size": spec["batch_size"], "gradient_accumulation": 1,
            "learning_rate": spec["learning_rate"], "warmup": 0, "max_length": spec["max_length"],
            "seed": spec["seed"], "threads": THREADS, "evaluate": False,
            "eight_bits": spec["contestant"] == "inlay, 8-bit compute",
        }
    )  # fmt: skip


def ours(config: RunConfig, spec: dict[str, Any], pauses: Pauses) -> tuple[float, dict[str, Any]]:
    """Train as `inlay train` does; the held-out loss is the run's own."""
    found: list[float] = []

    def listen(event: Event) -> None:
        if event.kind == "checkpoint" and event.step == 0:
            pauses.begins()
        elif event.kind == "step":
            pauses.step()
        elif event.kind == "evaluation" and event.eval_loss is not None:
            found.append(event.eval_loss)

    result = train(config, on_event=listen)
    assert result.tokenizer is not None
    return found[-1], {
        "tokens": tokens(config, rows_of_run(config), result.tokenizer),
        "settings": {"packing": config.packing, "dtype": config.dtype},
    }


def peer(config: RunConfig, spec: dict[str, Any], pauses: Pauses) -> tuple[float, dict[str, Any]]:
    """Train as the documentation of TRL and peft sets a run up, from the same adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    args = SFTConfig(
        output_dir=config.output,
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        max_length=config.max_length,
        seed=config.seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = rows_of_run(config)
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(model, spec["adapter"], is_trainable=True),
        args=args,
        train_dataset=pairs(Path(config.data)),
        processing_class=tokenizer,
        callbacks=[Callback(pauses)],
    )
    trainer.train()
    held_out = encoded(rows.validation, tokenizer, config)
    measured = losses(model.eval(), held_out, max(config.batch_size, 8))
    return sum(r.nll for r in measured) / sum(r.tokens for r in measured), {
        "tokens": sum(len(ids) for ids in trainer.train_dataset["input_ids"]),
        "settings": {
            "packing": args.packing, "bf16": args.bf16, "loss_type": args.loss_type,
            "gradient_checkpointing": args.gradient_checkpointing,
            "padding_free": args.padding_free,
        },
    }  # fmt: skip


class Callback(TrainerCallback):
    """Pauses transformers' Trainer."""

    def __init__(self, pauses: Pauses) -> None:
        self.pauses = pauses

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.pauses.begins()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.pauses.step()


def pairs(path: Path) -> Any:
    """Return a file's rows as TRL takes them."""
    from datasets import Dataset

    return Dataset.from_json(str(path))


def tokens(config: RunConfig, rows: RunRows, tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens of the training rows."""
    return sum(len(row.input_ids) for row in encoded(rows.train, tokenizer, config))


def encoded(rows: Rows, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> list[Encoded]:
    """Return rows as tokens, as a run has them."""
    return encode(rows, TextReader(tokenizer, training_template), config.max_length)


if __name__ == "__main__":
    serve(work)
