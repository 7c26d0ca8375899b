"""Attaches an increasing number of adapters to one model and measures what each number costs.

Started by `turns.Worker`; each request names a number of adapters, not below the last one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import inlay
from benchmarks.lib.machine import THREADS
from benchmarks.lib.step_worker import Training, touched
from benchmarks.lib.turns import Parent, serve, status
from inlay.model.adapters.registry import adapters


def work(parent: Parent, spec: dict[str, Any]) -> None:
    """Measure until the parent is gone."""
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=torch.bfloat16).train()
    touched(model)
    before = status("VmRSS")
    parent.answer(ready=True)
    while True:
        parent.answer(**grown(model, spec, parent.wait(), before))


def grown(
    model: nn.Module, spec: dict[str, Any], asked: dict[str, Any], before: int
) -> dict[str, Any]:
    """Attach up to the asked number, make the last one active, step and save it."""
    have = len(adapters(model)) if hasattr(model, "inlay") else 0
    new = [f"a{number}" for number in range(have, asked["adapters"])]
    attach = seconds(lambda: attach_all(model, new, spec["rank"]))
    held = status("VmRSS") - before
    use = seconds(lambda: inlay.use(model, new[-1]))
    training = Training(model, spec)
    steps = [training.step()[0] for _ in range(asked["steps"] + 1)][1:]
    with tempfile.TemporaryDirectory() as folder:
        save = seconds(lambda: inlay.save_adapter(model, Path(folder) / "one", new[-1]))
    return {
        "attach_seconds": attach / len(new),
        "use_seconds": use,
        "save_seconds": save,
        "step_seconds": steps,
        "held_bytes": held,
    }


def attach_all(model: nn.Module, names: list[str], rank: int) -> None:
    """Attach an adapter under each name."""
    for name in names:
        inlay.attach(model, inlay.LoRA(rank=rank), name=name)


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    serve(work)
