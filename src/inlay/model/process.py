"""What adapted models change in their process, undone when the last of them is detached or freed.

A module holds a `Lease` on the changes that it needs. Copies and pickles of the module take out a
lease of their own, so that a change lasts as long as anything that needs it.
"""

from __future__ import annotations

import os
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from inlay.kernels.native import keep_memory, release_memory
from inlay.kernels.switches import is_on
from inlay.model.seams.transformers import register_attention, restore_by

LEASE = "inlay_lease"
Undo = Callable[[], object]


def keep_freed_memory() -> Undo:
    return release_memory if keep_memory() is None else lambda: None


def call_encoder_layers() -> Undo:
    """Have torch's encoder layers call their modules; its fused way reads weights past adapters."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


def hide_view_warnings() -> Undo:
    """Hide FSDP2's warning of blocks that return views, which nothing here changes in place."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    filters = cast("list[Any]", warnings.filters)
    put = filters[0]
    return lambda: filters.remove(put) if put in filters else None


@contextmanager
def threads(count: int | None) -> Generator[None]:
    """Compute on so many CPU threads inside the `with` block; on as many as before for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def restored() -> Generator[None]:
    """Give back environment, CPU threads and the state of random numbers after the `with` block."""
    environment, drawn, drawn_by_numpy = dict(os.environ), random.getstate(), np.random.get_state()
    try:
        with threads(None), torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def restore_in_trainer() -> Undo:
    from inlay.model.adapters.model_methods import restore  # imports this module

    return restore_by(restore)


def offer_attention() -> Undo:
    from inlay.model.fast.attention import ATTENTION, attention, mask_of_layers

    return register_attention(ATTENTION, attention, mask_of_layers)


class Change:
    """A change of the process, made for its first user and undone after its last."""

    def __init__(self, make: Callable[[], Undo]) -> None:
        self.make, self.users, self.lock = make, 0, threading.RLock()

    def __enter__(self) -> None:
        with self.lock:
            if self.users == 0:
                self.undo = self.make()
            self.users += 1

    def __exit__(self, *raised: object) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                self.undo()


CHANGES: Mapping[str, Change] = {
    "memory": Change(keep_freed_memory),
    "encoder": Change(call_encoder_layers),
    "view warnings": Change(hide_view_warnings),
    "trainer": Change(restore_in_trainer),
    "attention": Change(offer_attention),
}


class Lease:
    """One module's use of some changes; it ends by `end()`, or when the module is freed."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        changes = [CHANGES[name] for name in names]
        for change in changes:
            change.__enter__()
        self.end = weakref.finalize(self, leave, changes)
        self.end.atexit = False

    def __reduce__(self) -> tuple[type[Lease], tuple[frozenset[str]]]:
        return Lease, (self.names,)


def leave(changes: Iterable[Change]) -> None:
    for change in changes:
        change.__exit__()


def lease(module: nn.Module, *names: str) -> None:
    before: Lease | None = vars(module).get(LEASE)
    held = before.names if before is not None else frozenset[str]()
    vars(module)[LEASE] = Lease(held.union(names))
    if before is not None:
        before.end()


def end_lease(module: nn.Module) -> None:
    """Undo a module's changes, but for those that another module needs."""
    held: Lease | None = vars(module).pop(LEASE, None)
    if held is not None:
        held.end()


def enter(model: nn.Module) -> None:
    needed = {
        "memory": is_on("memory") and all(p.device.type == "cpu" for p in model.parameters()),
        "encoder": any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()),
        "trainer": isinstance(model, PreTrainedModel),
    }
    lease(model, *(name for name, wanted in needed.items() if wanted))
