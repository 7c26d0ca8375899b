"""The processes of one run: who is who, what they sum and tell each other, how one ends them all.

A process is started by torchrun, `accelerate launch` or `inlay train --gpus N`, which say in the
environment what its place is. The trainers of transformers and TRL are left in the belief that
they are alone: they would wrap the model, split the rows and average the loss in ways of their own.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from inlay.errors import InlayError, TrainingError, UsageError

Found = TypeVar("Found")
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher says of a process's place."""
HIDDEN = (*PLACE[:3], "LOCAL_WORLD_SIZE")
"""What the trainers are not to see."""
PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others before it takes them for lost."""
LOST = re.compile(
    "connection (closed|reset)|broken pipe|timed out|gloo|nccl|socket|failed to recv|watchdog", re.I
)
"""What the libraries say when another process has gone."""
FOREIGN = {
    "ACCELERATE_USE_FSDP": "give 'parallel: fsdp' in the run file instead",
    "ACCELERATE_USE_DEEPSPEED": "give 'parallel: fsdp' in the run file instead",
    "ACCELERATE_USE_MEGATRON_LM": "give 'parallel: ddp' or 'fsdp' in the run file instead",
    "ACCELERATE_DYNAMO_BACKEND": "leave compiling out of accelerate's configuration",
    "ACCELERATE_MIXED_PRECISION": "the run's own 'dtype' says what products are computed in",
}
"""What accelerate's configuration can ask for and a run of ours does not take from it."""
TOLD = "told"
MEETINGS = itertools.count()
"""Runs of this process so far: each meets the others under another name."""


@dataclass(frozen=True)
class World:
    """The place of this process among those of the run; by default it is the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Any = None

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, draws and reports."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of every process's values."""
        if self.alone:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def every(self, value: Found) -> list[Found]:
        """Return every process's value, by rank."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def every_tensor(self, tensor: Tensor) -> list[Tensor]:
        """Return every process's tensor, by rank; they have the same shape and dtype."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor.contiguous())
        return found

    def from_leader(self, work: Callable[[], Found]) -> Found:
        """Return what the first process makes of some work; what it raises is raised everywhere."""
        if self.alone:
            return work()
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except InlayError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    @contextmanager
    def in_turn(self) -> Generator[None]:
        """Let the processes of a machine go through the `with` block one after another."""
        for turn in range(self.local_size):
            if turn == self.local_rank:
                yield
            if not self.alone:
                dist.barrier()

    @contextmanager
    def together(self) -> Generator[None]:
        """Say in a sentence that another process has gone, whatever the libraries say."""
        try:
            yield
        except RuntimeError as error:
            if self.alone or not LOST.search(str(error)):
                raise
            raise TrainingError(
                f"process {self.rank} of {self.size} lost the others: one of them has ended, or "
                f"did not answer for {PATIENCE.seconds // 60} minutes; training stopped. See what "
                "ended it, then run the same command with --resume; another number of processes "
                "will do"
            ) from error

    def first_to_tell(self) -> bool:
        """Return whether no other process has reported the error yet."""
        with suppress(Exception):
            return self.store.compare_set(TOLD, "", str(self.rank)).decode() == str(self.rank)
        return True


ALONE = World()


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Generator[World]:
    """Give this process its place among those that a launcher started; alone without one.

    An error is told by one process only; the others end with the exit code of the command.
    """
    place = place_in(environment)
    if place is None:
        with unseen_by_trainers():
            yield ALONE
        return
    met = dist.is_initialized()
    world = connected(*place)
    with unseen_by_trainers(), ended_as_told():
        try:
            with world.together():
                yield world
        except (Exception, KeyboardInterrupt) as error:
            if not world.first_to_tell() and isinstance(error, InlayError | KeyboardInterrupt):
                raise SystemExit(2 if isinstance(error, InlayError) else 130) from error
            raise
        finally:
            if not met:
                dist.destroy_process_group()


def place_in(environment: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """Return rank, world size, local rank and local world size; None without a launcher."""
    size = number(environment, "WORLD_SIZE") if "WORLD_SIZE" in environment else 1
    if size == 1:
        return None
    missing = [name for name in PLACE if name not in environment]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size} and {', '.join(missing)} not set: start the run with torchrun, "
            "accelerate launch or `inlay train --gpus N`, which set them, or unset WORLD_SIZE"
        )
    for name, instead in FOREIGN.items():
        if environment.get(name, "no").lower() not in ("", "no", "false", "0"):
            said = f"{name}={environment[name]}"
            raise UsageError(f"accelerate's configuration sets {said}: {instead}")
    rank, local = number(environment, "RANK"), number(environment, "LOCAL_RANK")
    here = number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else size
    if not 0 <= rank < size or not 0 <= local < here:
        raise UsageError(
            f"the launcher says RANK={rank} of WORLD_SIZE={size} and LOCAL_RANK={local} of "
            f"LOCAL_WORLD_SIZE={here}; ranks count from 0 and stay below the number of processes"
        )
    return rank, size, local, here


def number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UsageError(f"{name} must be a whole number, not {environment[name]!r}") from None


def connected(rank: int, size: int, local_rank: int, local_size: int) -> World:
    """Return this process's place, connected to the others."""
    device = own_device(local_rank, local_size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if not dist.is_initialized():
            found, _, _ = next(iter(rendezvous("env://", rank, size, timeout=PATIENCE)))
            own = PrefixStore(f"inlay/{next(MEETINGS)}", found)
            dist.init_process_group(
                backend, store=own, rank=rank, world_size=size, timeout=PATIENCE
            )
        dist.barrier()
        store = PrefixStore(f"run/{next(MEETINGS)}", default_store())
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"process {rank} could not meet the others at {where}: {reason}; all {size} processes "
            "must be started, and reach that address and port"
        ) from error
    return World(rank, size, local_rank, local_size, device, store)


def default_store() -> Store:
    return dist.distributed_c10d._get_default_store()


def own_device(local_rank: int, local_size: int) -> torch.device:
    """Return this process's own device; of several GPUs it sees no other from now on."""
    # Counted before anything asks CUDA itself, which looks at CUDA_VISIBLE_DEVICES only once.
    count = torch.cuda.device_count()
    if count == 0:
        share_threads(local_size)
        return torch.device("cpu")
    if 1 < count < local_size:
        raise UsageError(
            f"{local_size} processes were started on a machine with {count} GPUs; start one a GPU"
        )
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank]
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def share_threads(local_size: int) -> None:
    """Take this process's part of the machine's cores, unless the user has said how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))


@contextmanager
def unseen_by_trainers() -> Generator[None]:
    """Let accelerate find no launcher in the environment."""
    before = {name: os.environ.pop(name) for name in HIDDEN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextmanager
def ended_as_told() -> Generator[None]:
    """Turn SIGTERM, by which launchers end what is left of a run, into a sentence."""

    def end(*signalled: object) -> None:
        del signalled
        raise TrainingError(
            "the launcher told this process to end (SIGTERM), as it does when another one has "
            "ended or the time is over; run the same command with --resume"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
