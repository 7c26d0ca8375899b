"""A contestant's process on the GPU: builds, takes timed steps, frees, when it is asked to.

Started by `turns.Worker`; the first request is the case and the contestant's name.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import BUILDERS, Spec, config_of, installed
from benchmarks.lib.shapes import Product, head_product, layer_products
from benchmarks.lib.turns import Parent, serve

BATCHES = 4
"""Batches of random tokens, used one after another over and over, so that the loss falls."""
LEARNING_RATE = 1e-3
MOST_ROWS = 32_768
"""Rows of a weight that are used to measure the GEMM rate."""
REPEATS = 3


def work(parent: Parent, spec: dict[str, Any]) -> None:
    """Take turns until the parent is gone."""
    if spec["contestant"] == "kernels":
        return measure_kernels(parent, spec)
    if spec["contestant"] == "peft + TRL":
        installed("trl")
    started = time.perf_counter()
    held = [built(spec)]
    parent.answer(build_seconds=time.perf_counter() - started, **released(held, spec))
    while True:
        request = parent.wait()
        if not held:
            held.append(built(spec))
        answer = turn(held[0], spec, request)
        parent.answer(**answer, **released(held, spec))


def measure_kernels(parent: Parent, spec: Spec) -> None:
    """Measure the kernels one by one, once."""
    installed("triton")
    from benchmarks.gpu.kernels import measured

    parent.answer(ready=True)
    parent.wait()
    parent.answer(table=measured(spec["device"]))


def built(spec: Spec) -> nn.Module:
    """Build the contestant's model; every contestant's adapter starts from the same values."""
    model = BUILDERS[spec["contestant"]](spec).train()
    generator = torch.Generator().manual_seed(spec["seed"])
    for p in model.parameters():
        if p.requires_grad and bool(p.any()):
            bound = p.shape[-1] ** -0.5
            drawn = torch.rand(p.shape, generator=generator) * (2 * bound) - bound
            p.data.copy_(drawn)
    return model


def released(held: list[nn.Module], spec: Spec) -> dict[str, int]:
    """Free the model when the next contestant needs the room; return the bytes that were held."""
    before = memory(spec["device"])
    if spec["release"]:
        held.clear()
        gc.collect()
    if spec["device"] == "cuda":
        torch.cuda.empty_cache()
    return {"held_bytes": before}


def memory(device: str) -> int:
    """Return what is allocated on the device now."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def turn(model: nn.Module, spec: Spec, request: dict[str, Any]) -> dict[str, Any]:
    """Warm up, take timed steps, and measure the GEMM rate in the same minute."""
    if spec["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
    weights = memory(spec["device"])
    take = trl_steps if spec["contestant"] == "peft + TRL" else plain_steps
    seconds, losses = take(model, spec, request["warm"] + request["steps"])
    peak = torch.cuda.max_memory_allocated() if spec["device"] == "cuda" else 0
    return {
        "seconds": seconds[request["warm"] :],
        "losses": losses,
        "weights_bytes": weights,
        "peak_bytes": peak,
        "gemm_flops_per_second": gemm_rate(spec),
    }


def plain_steps(model: nn.Module, spec: Spec, count: int) -> tuple[list[float], list[float]]:
    """Take optimiser steps by hand: the model's own loss, backward, AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = spec["device"] == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=fused)
    tokens = batches(spec)
    seconds: list[float] = []
    losses: list[Tensor] = []
    for _ in range(count):
        ids = next(tokens)
        started = now(spec["device"])
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(spec["device"]) - started)
        losses.append(loss.detach())
    return seconds, [float(loss) for loss in losses]


def trl_steps(model: nn.Module, spec: Spec, count: int) -> tuple[list[float], list[float]]:
    """Take optimiser steps by TRL's trainer as its documentation sets it up."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import inlay

    class Clock(TrainerCallback):
        """Keeps the time of every step."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(now(spec["device"]))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(now(spec["device"]))

    clock, tokens = Clock(), batches(spec)
    rows = Dataset.from_list([{"input_ids": next(tokens)[0].tolist()} for _ in range(count)])
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=count, per_device_train_batch_size=1,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", logging_steps=1,
            save_strategy="no", report_to="none", max_length=None, disable_tqdm=True,
            weight_decay=0.01, max_grad_norm=0.0, use_cpu=spec["device"] == "cpu",
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer: Any = SFTTrainer(
            model=model, args=settings, train_dataset=rows, callbacks=[clock],
            processing_class=inlay.load("pocket")[1],
        )  # fmt: skip
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)], losses


def batches(spec: Spec) -> Iterator[Tensor]:
    """Yield sequences of random tokens on the device, every one labelled."""
    generator = torch.Generator().manual_seed(spec["seed"])
    vocabulary = config_of(spec).vocab_size
    shape = (1, spec["tokens"])
    drawn = [torch.randint(vocabulary, shape, generator=generator) for _ in range(BATCHES)]
    drawn = [ids.to(spec["device"]) for ids in drawn]
    while True:
        yield from drawn


def now(device: str) -> float:
    """Return the time after the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def gemm_rate(spec: Spec) -> float:
    """Return the FLOP/s of the products of one forward pass, the median of a few of each."""
    config: Any = config_of(spec)
    products = [*layer_products(config), head_product(config)]
    seconds = sum(seconds_of(p, spec["tokens"], spec["device"]) for p in products)
    return sum(2.0 * spec["tokens"] * p.parameters for p in products) / seconds


def seconds_of(product: Product, tokens: int, device: str) -> float:
    """Return the seconds of the products of one kind in bf16, on random numbers."""
    rows = min(product.rows, MOST_ROWS)
    x = torch.randn(tokens, product.columns, device=device, dtype=torch.bfloat16)
    w = torch.randn(rows, product.columns, device=device, dtype=torch.bfloat16)
    out = torch.empty(tokens, rows, device=device, dtype=torch.bfloat16)
    times: list[float] = []
    for _ in range(REPEATS + 1):
        started = now(device)
        torch.mm(x, w.t(), out=out)
        times.append(now(device) - started)
    return statistics.median(times[1:]) * product.count * product.rows / rows


if __name__ == "__main__":
    serve(work)
