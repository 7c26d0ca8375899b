"""Two or more buffers that packed weights pass through, filled by a thread just ahead of use.

The weights are in *blocks*, a Transformer block each, in the order the model runs them. A product
uses a block (`Buffers.use`): it waits until the block lies in a buffer, and keeps it there until
the product is done. Meanwhile the thread fills the other buffers with the blocks that come next:
those that came next the last time the model went from one block to this one, so that the forward
pass, the backward pass and recomputation are each learned when first seen.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from inlay.errors import StorageError

ALIGNMENT = 4096
"""Alignment in bytes of buffers, and of reads that bypass the kernel's cache."""
CHECK_SECONDS = 0.5
"""Seconds between two checks that the thread is alive."""


class Piece(Protocol):
    """One packed part, or rows of one, that lies in a file or in host memory."""

    @property
    def room(self) -> int:
        """Bytes of buffer it needs, a multiple of ALIGNMENT."""
        ...

    def fill(self, room: Tensor) -> None:
        """Bring the bytes into a host buffer, (room,) uint8; raise StorageError when it cannot."""
        ...

    def found_in(self, room: Tensor) -> Tensor: ...


@dataclass
class Block:
    """The pieces that are brought in together, each with its place in the buffer."""

    pieces: list[Piece] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    room: int = 0

    def add(self, piece: Piece) -> int:
        place = self.room
        self.pieces.append(piece)
        self.places.append(place)
        self.room += piece.room
        return place


@dataclass
class Statistics:
    """Bytes brought in, and the time that products waited for them.

    `loads` counts blocks, `waits` the uses that had to wait, `waited` the seconds they did.
    """

    loads: int = 0
    bytes: int = 0
    waits: int = 0
    waited: float = 0.0


class Slot:
    """One buffer: the bytes where products run, and a pinned copy of them on the host."""

    def __init__(self, room: int, device: torch.device) -> None:
        self.host = aligned(room, pinned=device.type == "cuda")
        self.bytes = (
            self.host if device.type == "cpu" else torch.empty_like(self.host, device=device)
        )
        self.block: int | None = None
        self.loaded = False
        self.uses = 0
        self.arrived = torch.cuda.Event() if device.type == "cuda" else None
        self.released = torch.cuda.Event() if device.type == "cuda" else None


class Shared:
    """State shared by the thread and the model's products; guarded by `changed`."""

    def __init__(self, blocks: Sequence[Block], slots: int, device: torch.device) -> None:
        room = max(block.room for block in blocks)
        self.blocks = blocks
        self.device = device
        self.slots = [Slot(room, device) for _ in range(slots)]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.changed = threading.Condition()
        self.waiting: list[int] = []
        self.order = Order(len(blocks))
        self.statistics = Statistics()
        self.failure: BaseException | None = None
        self.closed = False

    def slot_of(self, block: int) -> Slot | None:
        return next((s for s in self.slots if s.block == block), None)

    def blocks_to_hold(self) -> list[int]:
        ahead = self.order.ahead(len(self.slots))
        return list(dict.fromkeys([*self.waiting, *ahead]))[: len(self.slots)]

    def next_fill(self) -> tuple[Slot, int] | None:
        to_hold = self.blocks_to_hold()
        missing = next((b for b in to_hold if self.slot_of(b) is None), None)
        free = next((s for s in self.slots if not s.uses and s.block not in to_hold), None)
        return None if missing is None or free is None else (free, missing)

    def fill(self, slot: Slot, block: Block) -> None:
        if slot.arrived is not None:
            slot.arrived.synchronize()
        for piece, place in zip(block.pieces, block.places, strict=True):
            piece.fill(slot.host[place : place + piece.room])
        if self.stream is not None:
            self.copy_to_device(slot, block.room)

    def copy_to_device(self, slot: Slot, room: int) -> None:
        """Copy a filled host buffer to the device, after the last product that used the buffer."""
        assert self.stream is not None
        assert slot.arrived is not None
        assert slot.released is not None
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(slot.released)
            slot.bytes[:room].copy_(slot.host[:room], non_blocking=True)
            slot.arrived.record(self.stream)


class Order:
    """The order blocks are used in, learned: the block after each pair of successive blocks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.before, self.present = -1, 0
        self.after: dict[tuple[int, int], int] = {}

    def move(self, block: int) -> None:
        if block == self.present:
            return
        self.after[self.before, self.present] = block
        self.before, self.present = self.present, block

    def ahead(self, count: int) -> list[int]:
        """Return the present block and those expected after it, at most `count` of them."""
        before, present = self.before, self.present
        found = [present]
        for _ in range(count - 1):
            before, present = present, self.following(before, present)
            found.append(present)
        return found

    def following(self, before: int, present: int) -> int:
        """Return the block that followed this pair last time, else the next in this direction.

        Past the last block the direction turns, as it does from the forward to the backward pass.
        """
        onward = present + (1 if present >= before else -1)
        if not 0 <= onward < self.count:
            onward = before
        return self.after.get((before, present), max(onward, 0))


class Buffers:
    """The buffers of one model; the thread ends with the last layer that refers to them."""

    def __init__(self, blocks: Sequence[Block], slots: int, device: torch.device) -> None:
        """Start the thread; `slots` is how many blocks may lie in memory at once, at least 2."""
        self.shared = Shared(blocks, max(2, slots), device)
        self.thread = threading.Thread(
            target=keep_filled, args=(self.shared,), name="inlay-stream", daemon=True
        )
        weakref.finalize(self, close, self.shared)
        self.thread.start()

    @property
    def device(self) -> torch.device:
        return self.shared.device

    @property
    def statistics(self) -> Statistics:
        return self.shared.statistics

    @property
    def nbytes(self) -> int:
        return sum(slot.bytes.nbytes for slot in self.shared.slots)

    @contextmanager
    def use(self, block: int) -> Generator[Tensor]:
        """Hold a block for the `with` block; raise `StorageError` if it cannot be read."""
        shared = self.shared
        with shared.changed:
            shared.order.move(block)
            slot = self.awaited(block)
            slot.uses += 1
            shared.changed.notify_all()
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        try:
            yield slot.bytes
        finally:
            if slot.released is not None:
                slot.released.record(torch.cuda.current_stream(self.device))
            with shared.changed:
                slot.uses -= 1
                shared.changed.notify_all()

    def awaited(self, block: int) -> Slot:
        """Return the buffer that holds a block, once it does; the lock is held."""
        shared = self.shared
        slot = shared.slot_of(block)
        if slot is not None and slot.loaded:
            return slot
        shared.statistics.waits += 1
        begun = time.perf_counter()
        shared.waiting.append(block)
        try:
            while slot is None or not slot.loaded:
                self.check_alive()
                shared.changed.notify_all()
                shared.changed.wait(CHECK_SECONDS)
                slot = shared.slot_of(block)
        finally:
            shared.waiting.remove(block)
            shared.statistics.waited += time.perf_counter() - begun
        return slot

    def check_alive(self) -> None:
        failure = self.shared.failure
        if isinstance(failure, StorageError):
            raise StorageError(str(failure)) from failure
        if failure is not None or not self.thread.is_alive():
            raise StorageError(
                "the thread that brings streamed weights in has ended"
                + (f" ({type(failure).__name__}: {failure})" if failure else "")
                + ", so the model can no longer be used; load it again"
            ) from failure


def keep_filled(shared: Shared) -> None:
    """Fill buffers until they are closed; a failure is raised where the weights are used."""
    try:
        while (work := next_work(shared)) is not None:
            slot, block = work
            shared.fill(slot, shared.blocks[block])
            with shared.changed:
                slot.loaded = True
                shared.statistics.loads += 1
                shared.statistics.bytes += shared.blocks[block].room
                shared.changed.notify_all()
    except BaseException as failure:
        with shared.changed:
            shared.failure = failure
            shared.changed.notify_all()


def next_work(shared: Shared) -> tuple[Slot, int] | None:
    with shared.changed:
        while not shared.closed:
            work = shared.next_fill()
            if work is not None:
                slot, block = work
                slot.block, slot.loaded = block, False
                return work
            shared.changed.wait()
    return None


def close(shared: Shared) -> None:
    with shared.changed:
        shared.closed = True
        shared.changed.notify_all()


def aligned(room: int, pinned: bool = False) -> Tensor:
    """Return an empty host buffer, (room,) uint8, that starts at a multiple of ALIGNMENT."""
    whole = torch.empty(room + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + room]


def rounded_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
