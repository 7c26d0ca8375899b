"""A ledger of memory: every storage counts from the operation that makes it until it dies."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Size, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from inlay.kernels.cost import FLOPS, SCRATCH, Scratch
from inlay.kernels.scratch import HALVES
from inlay.memory.heap import SMALLEST, Event
from inlay.memory.known import followed, tensors_in
from inlay.memory.policy import PRODUCTS

CATEGORIES = ("weights", "adapter", "gradients", "optimiser", "activations", "loss", "buffers")
"""Uses of device memory; `buffers` are short-lived, recomputed layers among them."""
HOST = "host"
"""Tensors that were moved to the host's memory, which do not count as the device's."""


@dataclass
class Work:
    """The work of one kind of operation in a step."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0
    """Read and written, if every tensor goes through memory once."""


@dataclass
class Entry:
    """One storage that is alive."""

    size: int
    category: str
    block: int
    alive: weakref.ref[Any] = field(repr=False)


class Ledger(TorchDispatchMode):
    """Counts every storage from the operation that makes it until it dies, by category."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[int, Entry] = {}
        self.live: Counter[str] = Counter()
        self.total = self.peak = self.host_peak = 0
        self.kept = 0
        """Bytes of the buffer that operations keep; alive from the first step on."""
        self.at_peak: dict[str, int] = {}
        self.category = "weights"
        """The category of what is made now."""
        self.work: dict[str, Work] = {}
        self.products: set[tuple[int, int, int]] = set()
        self.half_products: set[tuple[Size, ...]] = set()
        """Shapes of the factors of PyTorch's own products in halves: it makes code for each."""
        self.trace: list[Event] = []
        """Blocks that are made and freed, for the model of the allocator."""
        self.made = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func).removesuffix(".default")
        scratch = SCRATCH[name](*args, **kwargs) if name in SCRATCH else Scratch()
        passing = [self.block(size) for size in scratch.passing]
        out = followed(func, args, kwargs)
        inputs = tensors_in((args, kwargs))
        outputs = tensors_in(out)
        category = "loss" if "cross_entropy" in name else None
        made = [t for t in outputs if self.add(t, category)]
        self.kept = max(self.kept, scratch.kept)
        if scratch.multiplied is not None:
            self.products.add(scratch.multiplied)
        if func._schema.name in PRODUCTS and outputs[0].dtype in HALVES:
            self.half_products.add(tuple(t.shape for t in inputs))
        self.touch(sum(scratch.passing))
        self.trace += [(number, 0) for number in passing]
        self.note_work(name, func, args, kwargs, out, inputs, made)
        return out

    def add(self, tensor: Tensor, category: str | None = None) -> bool:
        """Count a tensor's storage, unless it is counted already; say whether it was new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.entries:
            return False
        category = category or self.category
        size = storage.nbytes()
        alive = weakref.ref(storage, lambda _: self.drop(key))
        self.entries[key] = Entry(size, category, self.block(size), alive)
        self.change(category, size)
        return True

    def lend(self, tensor: Tensor) -> None:
        """Stop counting a tensor, whose bytes are counted elsewhere."""
        entry = self.entries[tensor.untyped_storage()._cdata]
        self.change(entry.category, -entry.size)
        entry.size = 0

    def drop(self, key: int) -> None:
        entry = self.entries.pop(key)
        self.change(entry.category, -entry.size)
        self.trace.append((entry.block, 0))

    def block(self, size: int) -> int:
        """Record a new block of memory; return its number."""
        self.made += 1
        if size >= SMALLEST:
            self.trace.append((self.made, size))
        return self.made

    def recategorise(self, tensor: Tensor, category: str) -> None:
        if not self.add(tensor, category):
            entry = self.entries[tensor.untyped_storage()._cdata]
            self.change(entry.category, -entry.size)
            entry.category = category
            self.change(category, entry.size)

    def change(self, category: str, size: int) -> None:
        self.live[category] += size
        if category == HOST:
            self.host_peak = max(self.host_peak, self.live[HOST])
        else:
            self.total += size

    def touch(self, workspace: int) -> None:
        if self.total + workspace > self.peak:
            self.peak = self.total + workspace
            self.at_peak = {name: self.live[name] for name in CATEGORIES}
            self.at_peak["buffers"] += workspace

    def start_over(self) -> None:
        """Reset the peak and the work; what is alive stays counted."""
        self.peak, self.host_peak, self.work = 0, 0, {}
        self.trace.clear()
        self.touch(0)

    def note_work(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        inputs: Sequence[Tensor],
        made: Sequence[Tensor],
    ) -> None:
        """Count an operation's arithmetic and traffic; views have neither."""
        written = made or (inputs[:1] if func._schema.is_mutable else [])
        if not written:
            return
        work = self.work.setdefault(name, Work())
        work.calls += 1
        work.bytes += sum(t.nbytes for t in (*inputs, *written))
        packet = getattr(func, "overloadpacket", None)
        if name in FLOPS:
            work.flops += FLOPS[name](*args, **kwargs)
        elif packet in flop_registry:
            work.flops += flop_registry[packet](*args, **kwargs, out_val=out)
