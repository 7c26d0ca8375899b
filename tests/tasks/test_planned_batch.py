"""A planned batch is the largest one that is trained, for every task, with and without images."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from heads_tiny import make_classify, make_embed, make_reward
from torch import Tensor
from train_tiny import make_run, make_task, stages_of
from vision_tiny import make_vision_run

from inlay.memory.devices import this_machine
from inlay.run.config import RunConfig
from inlay.tasks import TASKS
from inlay.train.adapted_model import load_adapted


def run_of(name: str, folder: Path) -> RunConfig:
    """Return a short run of a task, with images or without."""
    task, _, variant = name.partition("-")
    if variant == "images":
        keys: dict[str, Any] = {"task": task, "split": [0.6, 0.2, 0.2], "epochs": 2.0, "count": 120}
        return make_vision_run(folder, targets=["language"], **keys, **answers_of(task))
    if task == "sft":
        return make_run(folder, packing="auto" if variant == "packed" else False)
    if task in ("dpo", "kto", "orpo", "grpo"):
        return make_task(task, folder)
    makers = {"classify": make_classify, "reward": make_reward, "embed": make_embed}
    return makers[task](folder, **({"kind": "tokens"} if variant == "tags" else {}))


def answers_of(task: str) -> dict[str, Any]:
    return {} if task == "sft" else {"many": 2, "generate_rows": 0}


NAMES = (
    "sft", "sft-packed", "sft-images", "dpo", "dpo-images", "kto", "kto-images", "orpo",
    "orpo-images", "grpo", "classify", "classify-tags", "reward", "embed",
)  # fmt: skip


def test_every_task_is_here() -> None:
    assert {name.partition("-")[0] for name in NAMES} == set(TASKS)
    seeing = {name for name, task in TASKS.items() if task.sees_images}
    assert {name.removesuffix("-images") for name in NAMES if "images" in name} == seeing


@pytest.mark.parametrize("name", NAMES)
def test_the_planned_batch_is_the_largest_trained_one(name: str, tmp_path: Path) -> None:
    config = run_of(name, tmp_path)
    stages = stages_of(config)
    run = stages.task
    tokens, _ = stages.tokens()
    planned = run.to_plan(tokens.train, this_machine()).batch
    model, tokenizer = load_adapted(run.config, stages.method, run.head)
    run.prepare(model, tokens, {})
    setup = stages.setup(model, tokenizer, tokens, {"learning_rate": {"value": 1e-3}})
    trainer: Any = run.trainer(setup)
    trained = list(batches_of(trainer, ceil(run.config.epochs), run.config.batch_size))
    if name == "grpo":
        (batch,) = [trainer.batch_of(range(len(tokens.train)))]
        length = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
        rows, width = planned["input_ids"].shape
        assert (rows, width >= length) == (batch["prompt_ids"].shape[0], True)
        return
    sizes = [size_of(batch) for batch in trained]
    assert size_of(planned) == max(sizes)
    largest = [batch for batch, size in zip(trained, sizes, strict=True) if size == max(sizes)]
    assert any(same_rows(planned, batch) for batch in largest)


def batches_of(trainer: Any, epochs: int, size: int) -> Any:
    """Yield every batch of a run."""
    order = trainer._get_train_sampler()
    for epoch in range(epochs):
        if hasattr(order, "set_epoch"):
            order.set_epoch(epoch)
        numbers = list(order)[: len(trainer.lengths)]
        for start in range(0, len(numbers), size):
            yield trainer.batch_of(numbers[start : start + size])


def size_of(batch: dict[str, Tensor]) -> int:
    """Return the tokens of a batch, padding included."""
    return max(x.numel() for n, x in batch.items() if n.endswith("input_ids") and "KL" not in n)


def same_rows(planned: dict[str, Tensor], trained: dict[str, Tensor]) -> bool:
    """Say whether two batches hold the same rows, and the same images."""
    shared = [n for n in planned if n in trained and n not in ("input_ids", "labels", "padding")]
    if any(planned[name].shape != trained[name].shape for name in shared):
        return False
    exact = [n for n in shared if n.endswith("attention_mask") or n == "position_ids"]
    pixels = [n for n in shared if n.startswith("pixel")]
    return all(torch.equal(planned[name], trained[name]) for name in exact) and all(
        torch.allclose(planned[name].float(), trained[name].float()) for name in pixels
    )
