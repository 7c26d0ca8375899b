"""A run's plan: the step it will take, on fake tensors, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import ceil

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from inlay.data.labelled import Labelled
from inlay.data.preference import Pair
from inlay.data.prompts import encode_prompts
from inlay.data.tokens import Encoded
from inlay.errors import ModelError
from inlay.kernels.loss import IGNORED
from inlay.memory.devices import Device
from inlay.memory.generating import Answering
from inlay.memory.optimisers import Optimiser, adamw, adamw_8bit
from inlay.memory.plan import Plan, Product, Task, plan
from inlay.memory.policy import POLICIES, Policy
from inlay.memory.probe import runtime
from inlay.memory.skeleton import computing_dtype, config_of, skeleton
from inlay.methods.catalog import build_method
from inlay.model.adapters.attach import attach
from inlay.model.fast.padding import length_multiple
from inlay.model.load.causal import check_writes
from inlay.model.load.eight_bits import compute_in_8_bits
from inlay.model.load.folder import located
from inlay.model.load.heads import Head, not_adapted, to_train
from inlay.model.load.libraries import quiet_transformers
from inlay.model.load.tokenizer import has_tokenizer, read_tokenizer
from inlay.run.config import RunConfig
from inlay.train.collate import Concatenate
from inlay.train.mismatched import mismatched_in_batches
from inlay.train.order import kept_order, order
from inlay.train.rows import encode_labelled_rows, encode_pair_rows, encode_rows, rows_of_run
from inlay.train.tasks import TASKS
from inlay.train.trainer import labels

EPOCHS_LOOKED_AT = 10
UNKEPT = "KL_"
"""What the inputs of a pass without a gradient begin with, as TRL's KTOTrainer names them."""
SEEING = "inlay.train.vision_planning"
"""The module that plans rows with images."""


def same(config: RunConfig) -> RunConfig:
    """Return a run as it is."""
    return config


@dataclass(frozen=True)
class Rows:
    """What the plan needs of the data: the largest batch, and how much there is."""

    batch: dict[str, Tensor]
    count: int
    tokens: int
    trained_tokens: int
    assumed: bool = False
    """Whether there were no rows to look at, so that every one is taken to be of full length."""
    step: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None
    """The loss of a task that does not ask the model itself for it."""
    head: Head | None = None
    beside: int = 0
    """Bytes of the host's memory that the rows take beside a step's."""
    as_run: Callable[[RunConfig], RunConfig] = same
    """Returns the run as such rows take it."""


def planned_run(config: RunConfig, rows: Rows, device: Device, shards: int = 1) -> Plan:
    """Plan a run's step on a device, from the model's configuration alone.

    With `shards`, the frozen weights are divided among so many devices.

    Raises:
        ModelError: the configuration cannot be read, or the step not be followed.
    """
    shape, _ = config_of(config.model, config.revision)
    loss, head, beside = rows.step, rows.head, rows.beside
    run = rows.as_run(config)
    return planned_step(shape, run, rows.batch, device, shards, loss=loss, head=head, beside=beside)


def planned_step(
    shape: PreTrainedConfig,
    config: RunConfig,
    batch: Mapping[str, Tensor],
    device: Device,
    shards: int = 1,
    *,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    head: Head | None = None,
    beside: int = 0,
) -> Plan:
    """Plan a step of a model that is given as its configuration."""
    task = Task(
        build=partial(built, shape, config, device, head),
        batch=batch,
        loss=loss or step_loss,
        optimiser=optimiser_of(config, device),
        accumulation=config.gradient_accumulation,
        dtype=computing_dtype(shape, config.dtype),
        streamed=leaves_weights(config.stream, device),
        answering=answering(config, batch),
        shards=shards,
    )
    loop = TASKS[config.task].loop
    held = partial(held_beside, loop, beside)
    return plan(task, device, runtime=held, policies=policies_of(config))


def leaves_weights(stream: str, device: Device) -> bool:
    """Say whether streaming takes the weights out of the memory that is planned."""
    return stream == "disk" or (stream == "host" and device.kind == "cuda")


def answering(config: RunConfig, batch: Mapping[str, Tensor]) -> Answering | None:
    """Return the answers that a step generates in this process's own memory, if it does."""
    if config.max_completion_tokens is None or config.generation == "vllm":
        return None
    answers = config.batch_size * config.gradient_accumulation
    prompt = max(1, batch["input_ids"].shape[1] - config.max_completion_tokens)
    return Answering(answers, prompt, config.max_completion_tokens, sorts=config.top_p != 1.0)


def step_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss that training asks the model for, after a pass that nothing is kept of."""
    own = {name: value for name, value in batch.items() if not name.startswith(UNKEPT)}
    other = {n.removeprefix(UNKEPT): x for n, x in batch.items() if n.startswith(UNKEPT)}
    if other:
        with torch.no_grad():
            model(**other, use_cache=False)
    loss = getattr(model(**own, use_cache=False), "loss", None)
    if loss is None:
        raise ModelError(
            f"{type(model).__name__} gives no loss for a row with labels, expected the loss of "
            "the next token: its class is trained by other means than this"
        )
    return loss


def held_beside(loop: str, beside: int, products: frozenset[Product]) -> int:
    """Return what this process holds beside the model: all that a run imports, and its rows."""
    import_module(loop)
    return runtime(products) + beside


def built(
    shape: PreTrainedConfig, config: RunConfig, device: Device, head: Head | None = None
) -> nn.Module:
    """Build the run's model without values, adapted and ready to train."""
    model = skeleton(
        shape,
        config.storage,
        double_quant=config.double_quant,
        dtype=config.dtype,
        head=head,
        head_storage=config.head_storage,
        embedding_on_device=config.embedding_storage == "dense" or device.kind == "cpu",
    )
    attach(
        model,
        build_method(config.method, config.hyperparameters),
        targets=config.targets,
        exclude=[*config.exclude, *not_adapted(model)],
        layers=config.layers,
        modules_to_save=[*config.modules_to_save, *to_train(model)],
        trainable_tokens=range(len(set(config.trainable_tokens))),  # which ones costs the same
    )
    return (compute_in_8_bits(model) if config.eight_bits else model).train()


def policies_of(config: RunConfig) -> Sequence[Policy]:
    """Return the activation policies a run allows."""
    return POLICIES if config.activations == "auto" else (config.activations,)


def optimiser_of(config: RunConfig, device: Device) -> Optimiser:
    """Return the run's optimiser, as it counts on this device."""
    if getattr(config, "optimizer", "adamw") != "adamw":
        return adamw_8bit
    return partial(adamw, foreach=device.kind == "cuda")


# The largest batch


def rows_to_plan(config: RunConfig, encoded: Sequence[Encoded], multiple: int = 1) -> Rows:
    """Return the largest batch that the run's order yields, and how much data there is."""
    chosen = [encoded[i] for i in largest_batch(config, [len(r.input_ids) for r in encoded])]
    return Rows(
        collated(config, chosen, multiple),
        len(encoded),
        sum(len(row.input_ids) for row in encoded),
        sum(row.trained_tokens for row in encoded),
    )


def pairs_to_plan(config: RunConfig, pairs: Sequence[Pair], multiple: int = 1) -> Rows:
    """Return the largest batch of pairs, every chosen side and then every rejected one."""
    largest = [pairs[i] for i in largest_batch(config, [pair.length for pair in pairs])]
    counted = counted_in(config)
    both = [
        [counted(pair.chosen) for pair in part] + [pair.rejected for pair in part]
        for part in (largest, pairs)
    ]
    return Rows(
        collated(config, both[0], multiple),
        len(pairs),
        sum(len(row.input_ids) for row in both[1]),
        sum(row.trained_tokens for row in both[1]),
    )


def counted_in(config: RunConfig) -> Callable[[Encoded], Encoded]:
    """Return what makes of a preferred answer's row what the task's loss counts of it."""
    return everywhere if TASKS[config.task].prompts_count else as_trained


def as_trained(row: Encoded) -> Encoded:
    """Return a row whose loss counts what is trained on."""
    return row


def everywhere(row: Encoded) -> Encoded:
    """Return a row whose loss counts its prompt, too."""
    return row.everywhere()


def labelled_to_plan(config: RunConfig, rows: Sequence[Labelled], multiple: int = 1) -> Rows:
    """Return the largest batch of answers, and the largest of answers to other rows' prompts."""
    answers = [row.answer for row in rows]
    others = mismatched_in_batches(rows, config.batch_size, config.seed, config.max_length)
    own, unkept = (
        [part[i] for i in largest_batch(config, [len(row.input_ids) for row in part])]
        for part in (answers, others)
    )
    found = Rows(
        collated(config, own, multiple),
        len(rows),
        sum(len(row.input_ids) for row in answers),
        sum(row.trained_tokens for row in answers),
    )
    return with_unkept(found, collated(config, unkept, multiple))


def with_unkept(rows: Rows, batch: Mapping[str, Tensor]) -> Rows:
    """Return rows whose step has a pass over another batch before it, without a gradient."""
    unkept = {UNKEPT + name: value for name, value in batch.items()}
    return replace(rows, batch={**rows.batch, **unkept})


def prompts_to_plan(config: RunConfig, prompts: Sequence[Encoded], multiple: int = 1) -> Rows:
    """Return a batch of the longest answers to the longest prompt, and how much data there is."""
    group, answer = config.num_generations or 1, config.max_completion_tokens or 0
    longest = max(len(row.input_ids) for row in prompts)
    row = Encoded([0] * (longest + answer), [False] * longest + [True] * answer, longest + answer)
    tokens = sum(len(row.input_ids) + answer for row in prompts)
    return Rows(
        collated(config, [row] * config.batch_size, multiple),
        len(prompts) * group,
        tokens * group,
        len(prompts) * group * answer,
    )


def assumed_rows(config: RunConfig) -> Rows:
    """Return a batch of rows as long as the run allows, every token trained on.

    There are as many as `max_rows` lets in, or it is not known how many.
    """
    length, kind = config.max_length, TASKS[config.task].rows
    length += config.max_completion_tokens or 0
    row = Encoded([0] * length, [True] * length, length)
    sides = 2 if kind == "preference" else 1
    batch = collated(config, [row] * config.batch_size * sides, 1)
    if kind == "labelled":
        batch |= {UNKEPT + name: value for name, value in batch.items()}
    count = int((config.max_rows or 0) * (1.0 if config.eval_data else config.split[0]))
    return Rows(batch, count, count * sides * length, 0, assumed=True)


def largest_batch(config: RunConfig, lengths: Sequence[int]) -> list[int]:
    """Return the row numbers of the batch with the most tokens, padding included."""
    size, worst = config.batch_size, (0, [])
    arrange = kept_order if TASKS[config.task].kept_batches else order
    for epoch in range(min(ceil(config.epochs), EPOCHS_LOOKED_AT)):
        numbers = arrange(lengths, size, config.seed, epoch)
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            here = [lengths[i] for i in batch]
            tokens = sum(here) if config.packing else len(batch) * max(here)
            if tokens > worst[0]:
                worst = (tokens, batch)
    return worst[1]


def collated(config: RunConfig, rows: Sequence[Encoded], multiple: int) -> dict[str, Tensor]:
    """Return rows as the training loop joins them: one behind another, or padded."""
    filled = [{"input_ids": row.input_ids, "labels": labels(row)} for row in rows]
    if config.packing:
        batch = Concatenate(multiple)(filled)
        batch.pop("padding")
        return batch
    longest = max(len(row.input_ids) for row in rows)
    width = ceil(longest / multiple) * multiple
    return {
        "input_ids": torch.tensor([[*r["input_ids"], *[0] * missing(r, width)] for r in filled]),
        "labels": torch.tensor([[*r["labels"], *[IGNORED] * missing(r, width)] for r in filled]),
        "attention_mask": torch.tensor(
            [[1] * len(r["input_ids"]) + [0] * missing(r, width) for r in filled]
        ),
    }


def missing(row: Mapping[str, Sequence[int]], width: int) -> int:
    """Return how many tokens a row is shorter than `width`."""
    return width - len(row["input_ids"])


def padding_multiple(config: RunConfig, device: Device) -> int:
    """Return what the run pads row lengths to a multiple of, on this device."""
    shape, _ = config_of(config.model, config.revision)
    stand_in = nn.Linear(1, 1)
    stand_in.config = shape  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return length_multiple(stand_in) if device.kind == "cpu" else 1


def row_reader(config: RunConfig, device: Device, has_data: bool) -> Callable[[RunConfig], Rows]:
    """Return what works out a run's largest batch; the rows are read and encoded once.

    Without data, or without a tokenizer to encode them, rows are taken to be of full length.
    """
    verbs = TASKS[config.task].verbs
    if verbs:
        return import_module(verbs).row_reader(config, device, has_data)
    shape, where = config_of(config.model, config.revision)
    check_writes(shape)
    hub = not where.exists()
    if not has_data or config.packing == "bfd" or not (hub or has_tokenizer(where)):
        return assumed_rows
    with quiet_transformers():
        source = located(config.model, config.revision) if hub else where
        tokenizer = read_tokenizer(source, trust_remote_code=False)
        rows = rows_of_run(config).train
        if rows.pictured:
            return import_module(SEEING).row_reader(config, rows, source, device)
        multiple = padding_multiple(config, device)
        if rows.kind == "prompt":
            prompts = encode_prompts(rows, tokenizer, config.max_length)
            return lambda changed: prompts_to_plan(changed, prompts, multiple)
        if rows.kind == "preference":
            pairs = encode_pair_rows(rows, tokenizer, config.max_length)
            return lambda changed: pairs_to_plan(changed, pairs, multiple)
        if rows.kind == "labelled":
            labelled = encode_labelled_rows(rows, tokenizer, config.max_length)
            return lambda changed: labelled_to_plan(changed, labelled, multiple)
        encoded = encode_rows(rows, tokenizer, config.max_length)
    return lambda changed: rows_to_plan(changed, encoded, multiple)


def steps_of(config: RunConfig, rows: Rows) -> int:
    """Return how many optimiser steps the run takes."""
    if config.max_steps is not None:
        return config.max_steps
    if config.num_generations is not None:
        answers = config.batch_size * config.gradient_accumulation
        return ceil(config.epochs * (rows.count // answers))
    batches = ceil(rows.count / config.batch_size)
    return ceil(config.epochs * ceil(batches / config.gradient_accumulation))


def run_seconds(config: RunConfig, rows: Rows, step: float) -> float:
    """Return the run's seconds: the largest batch's, scaled by how long rows are on average."""
    if not rows.count:
        return steps_of(config, rows) * step
    mean = rows.tokens / rows.count * min(config.batch_size, rows.count)
    return steps_of(config, rows) * step * min(1.0, mean / rows.batch["input_ids"].numel())
