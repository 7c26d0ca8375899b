"""A run's plan: its own step on fake tensors, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from inlay.errors import ModelError
from inlay.memory.devices import Device
from inlay.memory.generating import Answering
from inlay.memory.optimisers import Optimiser, adamw, adamw_8bit
from inlay.memory.plan import Plan, Product, Task, plan
from inlay.memory.policy import POLICIES, Policy
from inlay.memory.probe import runtime
from inlay.memory.skeleton import computing_dtype, config_of
from inlay.model.fast.padding import length_multiple
from inlay.model.load.causal import check_writes
from inlay.model.load.folder import located
from inlay.model.load.heads import Head
from inlay.model.load.libraries import quiet_transformers
from inlay.model.load.tokenizer import has_tokenizer
from inlay.run.config import RunConfig
from inlay.train.adapted_model import built
from inlay.train.order import Arrange
from inlay.train.rows import rows_of_run
from inlay.train.task import TASKS

EPOCHS_LOOKED_AT = 10

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""(model, batch) -> the loss that a step goes back through."""


@dataclass(frozen=True)
class PlannedRows:
    """What a plan needs of a run's rows: the largest batch, its loss, and how much there is."""

    config: RunConfig
    """The run as such rows take it."""
    batch: dict[str, Tensor]
    loss: Loss
    count: int
    tokens: int
    trained_tokens: int
    head: Head | None = None
    assumed: bool = False
    """Whether there were no rows to look at, so that every one is taken to be of full length."""
    row_bytes: int = 0
    """Host memory held by the rows, in bytes."""
    answering: Answering | None = None
    """The answers that a step generates in this process, if it does."""
    whole_steps: bool = False
    """Whether an epoch leaves out the rows that fill no step."""


def rows_to_plan(
    config: RunConfig, device: Device, has_data: bool
) -> Callable[[RunConfig], PlannedRows]:
    """Return what works out a run's largest batch, also of the run under other keys.

    Without data, or without a tokenizer to encode them, rows are taken to be of full length.
    """
    task = TASKS[config.task]
    shape, where = config_of(config.model, config.revision)
    if not task.has_head:
        check_writes(shape)
    run, encoded = task.run(config), list[Any]()
    if has_data and (not where.exists() or has_tokenizer(where)) and config.packing != "bfd":
        rows = rows_of_run(config)
        with quiet_transformers():
            folder = where if where.exists() else located(config.model, config.revision)
            run.read_by(folder, rows.train.pictured)
        run.learn(rows)
        encoded = run.encode(rows.train)
    return lambda changed: run.changed(changed).to_plan(encoded, device)


def planned_run(rows: PlannedRows, device: Device, shards: int = 1) -> Plan:
    """Plan a run's step on a device, from the model's configuration alone.

    With `shards`, the frozen weights are divided among so many devices.
    """
    shape, _ = config_of(rows.config.model, rows.config.revision)
    return planned_step(shape, rows, device, shards)


def planned_step(
    shape: PreTrainedConfig, rows: PlannedRows, device: Device, shards: int = 1
) -> Plan:
    config = rows.config
    step = Task(
        build=partial(built, shape, config, device, rows.head),
        batch=rows.batch,
        loss=rows.loss,
        optimiser=optimiser_of(config, device),
        accumulation=config.gradient_accumulation,
        dtype=computing_dtype(shape, config.dtype),
        streamed=leaves_weights(config.stream, device),
        answering=rows.answering,
        shards=shards,
    )
    held = partial(held_by_process, rows.row_bytes)
    return plan(step, device, runtime=held, policies=policies_of(config))


def leaves_weights(stream: str, device: Device) -> bool:
    """Return whether streaming moves the weights out of the memory that is planned."""
    return stream == "disk" or (stream == "host" and device.kind == "cuda")


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss that training asks the model itself for."""
    loss = getattr(model(**batch, use_cache=False), "loss", None)
    if loss is None:
        raise ModelError(
            f"{type(model).__name__} gives no loss for a row with labels, expected the loss of "
            "the next token: its class is trained by other means than this"
        )
    return loss


def held_by_process(row_bytes: int, products: frozenset[Product]) -> int:
    """Return the bytes held apart from the model: the libraries, and the rows."""
    return runtime(products) + row_bytes


def policies_of(config: RunConfig) -> Sequence[Policy]:
    return POLICIES if config.activations == "auto" else (config.activations,)


def optimiser_of(config: RunConfig, device: Device) -> Optimiser:
    if config.optimizer != "adamw":
        return adamw_8bit
    return partial(adamw, foreach=device.kind == "cuda")


def largest_batch(config: RunConfig, lengths: Sequence[int], arrange: Arrange) -> list[int]:
    """Return the row numbers of the batch with the most tokens, padding included.

    Args:
        config: the run.
        lengths: the tokens of every row.
        arrange: the order in which the run takes its rows.
    """
    size, worst = config.batch_size, (0, [])
    for epoch in range(min(ceil(config.epochs), EPOCHS_LOOKED_AT)):
        numbers = arrange(lengths, size, config.seed, epoch)
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            here = [lengths[i] for i in batch]
            tokens = sum(here) if config.packing else len(batch) * max(here)
            if tokens > worst[0]:
                worst = (tokens, batch)
    return worst[1]


def padding_multiple(config: RunConfig, device: Device) -> int:
    shape, _ = config_of(config.model, config.revision)
    stand_in = nn.Linear(1, 1)
    stand_in.config = shape  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return length_multiple(stand_in) if device.kind == "cpu" else 1


def steps_of(rows: PlannedRows) -> int:
    config = rows.config
    if config.max_steps is not None:
        return config.max_steps
    if rows.whole_steps:
        in_epoch = rows.count // (config.batch_size * config.gradient_accumulation)
        return ceil(config.epochs * in_epoch)
    batches = ceil(rows.count / config.batch_size)
    return ceil(config.epochs * ceil(batches / config.gradient_accumulation))


def run_seconds(rows: PlannedRows, step: float) -> float:
    """Return the seconds of the largest batch, scaled by the mean length of the rows."""
    if not rows.count:
        return steps_of(rows) * step
    mean = rows.tokens / rows.count * min(rows.config.batch_size, rows.count)
    return steps_of(rows) * step * min(1.0, mean / rows.batch["input_ids"].numel())
