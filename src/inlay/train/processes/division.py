"""How a run is divided among processes: its rows, its frozen weights, who writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from inlay.errors import UsageError
from inlay.memory.devices import Device
from inlay.memory.plan import Plan
from inlay.run.config import RunConfig
from inlay.train.output.folder import RunFolder
from inlay.train.output.recorder import Recorder
from inlay.train.processes.share import Share, share_of
from inlay.train.processes.world import World
from inlay.train.task import TASKS


@dataclass(frozen=True)
class FollowedFolder(RunFolder):
    """A run's folder as a process sees it that does not write."""

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Leave run.json to the first process."""


class FollowingRecorder(Recorder):
    """Keeps count as the first process's recorder does, and writes nothing."""

    def write(self, line: dict[str, object]) -> None:
        """Leave metrics.jsonl to the first process."""

    def start_over(self) -> None:
        """Leave metrics.jsonl to the first process."""

    def cut(self, size: int) -> None:
        """Leave metrics.jsonl to the first process."""


def divided(config: RunConfig, world: World) -> tuple[RunConfig, Share]:
    """Return the run as one process takes part in it, and its part of every step."""
    share = share_of(config.batch_size, config.gradient_accumulation, world)
    if world.alone:
        return config, share
    for key, problem in refused(config, share):
        raise UsageError(f"{key!r} does not go with {world.size} processes: {problem}")
    own = {
        "batch_size": share.pass_rows,
        "gradient_accumulation": share.passes,
        "cache_trunk": False,
        "cache_vision": False,
    }
    known = {key: value for key, value in own.items() if hasattr(config, key)}
    return config.model_copy(update=known), share


def refused(config: RunConfig, share: Share) -> list[tuple[str, str]]:
    """Return the keys of a run that several processes cannot follow, and why."""
    sharded = config.parallel in ("fsdp", "hsdp")
    reasons = {
        **TASKS[config.task].undividable(config, share.pass_rows * share.passes, share.step_rows),
        "cache_trunk": config.cache_trunk is True
        and "each process would keep the frozen blocks' output of every row; leave it at auto",
        "cache_vision": getattr(config, "cache_vision", False) is True
        and "each process would keep the vision tower's output of every row; leave it at auto",
        "stream": sharded
        and config.stream != "off"
        and f"parallel {config.parallel!r} divides weights that lie in memory; leave one out",
        "embedding_storage": sharded
        and config.embedding_storage != "dense"
        and f"parallel {config.parallel!r} divides weights that lie in memory; leave one out",
        "eight_bits": sharded
        and config.eight_bits
        and "products in 8 bits were not tried on divided weights; give 'parallel: ddp'",
    }
    return [(key, reason) for key, reason in reasons.items() if isinstance(reason, str)]


def groups(config: RunConfig, world: World) -> list[int]:
    """Return among how many processes the frozen weights may be divided, the first wish first.

    One is: every process holds them all.
    """
    if world.alone or config.parallel == "ddp":
        return [1]
    if config.parallel == "hsdp":
        return [world.local_size]
    if config.parallel == "fsdp":
        return [world.size]
    leaves = config.stream != "off" or config.embedding_storage != "dense"
    whole_only = leaves or config.eight_bits
    return [1] if whole_only else [1, world.size]


def planned_division(
    plan: Callable[[Device, int], Plan], device: Device, choices: list[int], world: World
) -> tuple[Plan, int]:
    """Return the plan of the first division that fits, else of the last, and that division."""
    if device.kind == "cpu":
        device = replace(device, memory=device.memory // world.local_size)
    for shards in choices[:-1]:
        found = plan(device, shards)
        if found.chosen is not None:
            return found, shards
    return plan(device, choices[-1]), choices[-1]


def mesh_of(world: World, shards: int) -> DeviceMesh | None:
    """Return the processes that divide the frozen weights; None where each holds them all."""
    if shards == 1:
        return None
    kind = world.device.type
    if shards == world.size:
        return init_device_mesh(kind, (shards,))
    names = ("copies", "parts")
    return init_device_mesh(kind, (world.size // shards, shards), mesh_dim_names=names)["parts"]
