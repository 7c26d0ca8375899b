"""What to do when a run does not fit, or when nothing was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from inlay.errors import TrainingError
from inlay.memory.devices import Device
from inlay.memory.plan import Plan
from inlay.run.config import RunConfig
from inlay.train.planning import PlannedRows, planned_run
from inlay.train.task import TASKS

STORAGES = ("dense", "nf4")
"""Storages that are proposed, the most exact first."""
RANKS = (16, 32, 64, 128)
"""Ranks that are proposed; the first whose parameters outnumber the trained tokens."""


@dataclass(frozen=True)
class Proposal:
    """A run that fits, and why it is this one."""

    config: RunConfig
    plan: Plan
    reasons: tuple[str, ...]


def proposal(
    config: RunConfig,
    rows_for: Callable[[RunConfig], PlannedRows],
    device: Device,
    storages: Sequence[str] = STORAGES,
) -> Proposal:
    """Return LoRA on the most exact storage that fits, at the batch asked for or a smaller one."""
    reasons: list[str] = []
    for storage, batch, stream in candidates(config, storages, device):
        changed = config.model_copy(
            update={
                "method": "lora",
                "hyperparameters": {"rank": RANKS[0]},
                "storage": storage,
                "stream": stream,
                "batch_size": batch,
                "gradient_accumulation": ceil(
                    config.batch_size * config.gradient_accumulation / batch
                ),
            }
        )
        rows = rows_for(changed)
        found = planned_run(rows, device)
        place = "" if stream == "off" else f", streamed from {stream}"
        what = f"{storage}{place}, {batch} rows a pass"
        if found.chosen is not None:
            reasons.append(f"{what}: fits")
            ranked, why = with_rank(changed, found, rows)
            return Proposal(ranked, found, (*reasons, why))
        reasons.append(f"{what}: needs {found.least.total / 1e9:.1f} GB")
    raise TrainingError(
        f"nothing fits {device.name} with {device.memory / 1e9:.1f} GB: {'; '.join(reasons)}; "
        "lower max_length or take a smaller model"
    )


def candidates(
    config: RunConfig, storages: Sequence[str], device: Device
) -> list[tuple[str, int, str]]:
    """Return storage, rows a pass and where from it is streamed, from the most exact on."""
    sizes = sorted({config.batch_size, TASKS[config.task].least_batch}, reverse=True)
    if config.stream != "off":
        return [(storage, size, config.stream) for storage in storages for size in sizes]
    resident = [(storage, size, "off") for storage in storages for size in sizes]
    far = "host" if device.kind == "cuda" else "disk"
    return [*resident, *((storages[-1], size, far) for size in sizes)]


def with_rank(config: RunConfig, found: Plan, rows: PlannedRows) -> tuple[RunConfig, str]:
    """Return the run with a rank whose parameters can hold what the trained tokens teach."""
    per_rank = found.trained / RANKS[0]
    rank = next((r for r in RANKS if r * per_rank >= rows.trained_tokens), RANKS[-1])
    why = (
        f"rank {rank}: {rank * per_rank:,.0f} parameters to hold {rows.trained_tokens:,} trained "
        "tokens"
        if rows.trained_tokens
        else f"rank {rank}: enough for small and middling data"
    )
    return config.model_copy(update={"hyperparameters": {"rank": rank}}), why


def check_fits(found: Plan, config: RunConfig) -> None:
    if found.chosen is not None:
        return
    least = found.least
    raise TrainingError(
        f"training would run out of memory: the largest batch needs {least.total / 1e9:.2f} GB "
        f"with activations {least.policy!r}, and {found.device.name} has "
        f"{found.device.memory / 1e9:.2f} GB; {remedies(config)}"
    )


def remedies(config: RunConfig) -> str:
    """Return what would make a run smaller."""
    ways = [f"lower max_length (now {config.max_length})"]
    least = TASKS[config.task].least_batch
    if config.batch_size > least:
        ways.append(f"set batch_size to {least} and raise gradient_accumulation")
    if config.storage == "dense":
        ways.append("hold the base with storage nf4")
    elif config.head_storage == "dense" and "head_storage" not in TASKS[config.task].fixed:
        ways.append("hold an untied output head with head_storage nf4")
    if config.activations != "auto":
        ways.append("leave activations at auto")
    return ", or ".join(ways) + "; `inlay plan` shows what each needs"
