"""A plan: what a step needs under each activation policy, what fits, and how long it takes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import ModelError
from inlay.kernels.scratch import FAST_HALVES_ON_CPU
from inlay.kernels.switches import is_on
from inlay.memory.devices import CUDA_RUNTIME, Device
from inlay.memory.generating import Answered, Answering, simulate_answers
from inlay.memory.ledger import Work
from inlay.memory.optimisers import Optimiser
from inlay.memory.policy import POLICIES, Policy
from inlay.memory.probe import CODE_WITHOUT_HALVES, code_of_products
from inlay.memory.simulate import Frozen, Simulation, fake_tensors, frozen_bytes, simulate

Product = tuple[int, int, int]
"""The shape (m, k, n) of a matrix product."""
Runtime = Callable[[frozenset[Product]], int]
"""Returns the bytes that a process holds besides a model that multiplies these shapes."""
GATHERING = 50 << 20
"""Bytes that gathering weights over gloo adds to a CPU process: the shortfall of plans measured by
benchmarks/memory/distributed.py, equal for dense and NF4, and for two and four processes."""
ROOM = 0.95
"""The share of a device's memory that a plan may fill: plans are within 5% of what is measured."""


@dataclass(frozen=True)
class Option:
    """One step under one activation policy."""

    policy: Policy
    total: int
    """The most bytes held at once, the runtime included."""
    bytes: dict[str, int]
    """Use -> bytes, at the peak."""
    passes: int
    """The most bytes in the first forward and backward pass, runtime included."""
    kept: int
    """Bytes of activations that wait for the backward pass."""
    host: int
    """Bytes in host memory, not counted in the device's."""
    flops: int
    seconds: float
    """Seconds of one step."""
    streamed_total: int
    """The same total, were the frozen weights streamed from the host: two blocks lie here."""
    streamed_seconds: float


@dataclass(frozen=True)
class Plan:
    """The memory and time of a training step on a device."""

    device: Device
    options: tuple[Option, ...]
    """From the policy that keeps the most; those after the first that fits are not worked out."""
    chosen: Option | None
    """The first that fits; None where none does."""
    trained: int
    """Parameters that train."""
    limit: int
    """The bytes a step may take, what the process holds already included."""
    frozen: Frozen
    """The frozen weights, were they not divided."""

    @property
    def least(self) -> Option:
        return min(self.options, key=lambda option: option.total)

    @property
    def best(self) -> Option:
        """The chosen option, or else the one that needs the least memory."""
        return self.chosen or self.least


@dataclass(frozen=True)
class Task:
    """A step to plan: a model, a batch and how it is trained."""

    build: Callable[[], nn.Module]
    batch: Mapping[str, Tensor]
    loss: Callable[[nn.Module, dict[str, Any]], Tensor]
    optimiser: Optimiser
    accumulation: int
    dtype: torch.dtype
    streamed: bool = False
    """Whether the frozen weights come from the host just ahead of use."""
    answering: Answering | None = None
    """The answers that a step generates before it trains on them."""
    shards: int = 1
    """The devices that divide the frozen weights; each gathers a block just ahead of use."""


def plan(
    task: Task, device: Device, *, runtime: Runtime, policies: Sequence[Policy] = POLICIES
) -> Plan:
    """Work out a step under one policy after another, until one fits.

    Args:
        task: the step.
        device: where it runs.
        runtime: the bytes that this process holds besides the model; called on a CPU only.
        policies: those to try, from the one that keeps the most.

    Raises:
        ModelError: the step depends on values that are known only in training.
    """
    room = int(ROOM * device.memory)
    options: list[Option] = []
    trained, frozen = 0, Frozen(0, 0, 0)
    answered = task.answering and simulate_answers(task.build, task.answering, device.kind)
    tried = list(possible(policies, device))
    with fake_tensors():
        weights = frozen_bytes(task.build())
    if not task.streamed and weights / task.shards > room:
        tried = tried[-1:]
    for policy in tried:
        simulation = simulate(
            task.build,
            task.batch,
            task.loss,
            optimiser=task.optimiser,
            policy=policy,
            accumulation=task.accumulation,
            kind=device.kind,
            shards=task.shards,
        )
        trained, frozen = simulation.trained, simulation.frozen
        held = CUDA_RUNTIME
        if device.kind == "cpu":
            held = runtime(simulation.products) + (GATHERING if task.shards > 1 else 0)
            if task.dtype in FAST_HALVES_ON_CPU:
                held += code_of_products(len(simulation.products))
            else:
                held += CODE_WITHOUT_HALVES * simulation.half_products
        made = option(policy, simulation, task, device, held)
        options.append(
            made if answered is None else generating(made, answered, simulation, task, device)
        )
        if options[-1].total <= room:
            return Plan(device, tuple(options), options[-1], trained, room, frozen)
    return Plan(device, tuple(options), None, trained, room, frozen)


def possible(policies: Sequence[Policy], device: Device) -> Iterator[Policy]:
    """Yield the policies that this kind of device knows; ModelError where there is none."""
    found: list[Policy] = [p for p in policies if device.kind == "cuda" or p != "offload"]
    if not found:
        raise ModelError(
            "the activation policy 'offload' moves activations from a GPU to the host; on a CPU "
            "'layer-inputs' is the one that needs the least memory"
        )
    yield from found


def keeps_memory() -> bool:
    """Return whether freed memory stays in the process; `attach` arranges that."""
    return is_on("memory") and platform.libc_ver()[0] == "glibc"


def option(policy: Policy, found: Simulation, task: Task, device: Device, runtime: int) -> Option:
    weights = found.resting["weights"]
    resident = min(weights, found.streamed_weights) if task.streamed else found.at_peak["weights"]
    parts = {**found.at_peak, "weights": resident, "runtime": runtime}
    if device.kind == "cpu":
        parts["allocator"] = found.fragmentation(keeps=keeps_memory())
    total = sum(parts.values())
    overhead = runtime + parts.get("allocator", 0)
    pure = work_seconds(found.work, device, task.dtype)
    moving = 2 * found.host / device.link
    streaming = max(pure, moving + 2 * weights / device.link)
    return Option(
        policy=policy,
        total=total,
        bytes=parts,
        passes=found.passes + resident - found.at_peak["weights"] + overhead,
        kept=found.kept,
        host=found.host + found.on_host + (weights if task.streamed else 0),
        flops=found.flops,
        seconds=task.accumulation * (streaming if task.streamed else max(pure, moving)),
        streamed_total=total - resident + min(weights, found.streamed_weights),
        streamed_seconds=task.accumulation * streaming,
    )


def generating(
    step: Option, answered: Answered, found: Simulation, task: Task, device: Device
) -> Option:
    """Count the base's second scoring of the answers as about a third of a pass."""
    weights = step.bytes["weights"]
    parts = {
        "weights": weights,
        "adapter": found.resting["adapter"],
        "optimiser": found.resting["optimiser"],
        "key-value cache": answered.cache,
        "buffers": answered.buffers,
        "runtime": step.bytes["runtime"],
    }
    total = sum(parts.values())
    writing = work_seconds(answered.first, device, task.dtype)
    writing += answered.tokens * work_seconds(answered.each, device, task.dtype)
    streaming = (1 + answered.tokens) * found.resting["weights"] / device.link
    scoring = step.seconds / 3
    seconds = scoring + (max(writing, streaming) if task.streamed else writing)
    streamed = scoring + max(writing, streaming)
    larger = total > step.total
    resident = min(weights, found.streamed_weights)
    return replace(
        step,
        total=max(total, step.total),
        bytes=parts if larger else step.bytes,
        seconds=step.seconds + seconds,
        streamed_total=max(step.streamed_total, total - weights + resident),
        streamed_seconds=step.streamed_seconds + streamed,
    )


def work_seconds(work: Mapping[str, Work], device: Device, dtype: torch.dtype) -> float:
    rate, bandwidth = device.rate(dtype), device.bytes_per_second
    return sum(max(w.flops / rate, w.bytes / bandwidth) for w in work.values())
