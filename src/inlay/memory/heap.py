"""A model of the allocator, which holds more than the blocks that are alive.

Blocks are cut from a heap, the smallest free piece that is large enough first, the lowest of
equals; it grows at its end only. The heap that Inlay keeps for tensors returns nothing: what it
holds is its greatest extent. glibc's, otherwise, is returned beyond a threshold, and blocks at or
above another are mapped one by one; that one rises to the size of every mapped block that is
freed, up to 32 MB.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

PAGE = 4096
FIRST_THRESHOLD = 128 << 10
LARGEST_THRESHOLD = 32 << 20
ALIGNMENT = 64
SMALLEST = 4096
"""A free piece smaller than this is not split off; blocks below it are not followed."""

Event = tuple[int, int]
"""`(block's number, bytes)` when it is made, `(number, 0)` when it is freed."""


class Heap:
    """Follows blocks as glibc places them; `held` is what the system counts for them."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        """Whether memory is never returned: one heap, no mapped blocks."""
        self.threshold, self.trim = FIRST_THRESHOLD, 2 * FIRST_THRESHOLD
        self.top = self.touched = self.mapped = self.peak = 0
        self.by_size: list[tuple[int, int]] = []
        self.starts: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.blocks: dict[int, tuple[int | None, int]] = {}

    @property
    def held(self) -> int:
        """Bytes in memory: the heap as far as it was touched, and the mapped blocks."""
        return self.touched + self.mapped

    def replay(self, events: Iterable[Event]) -> None:
        made: set[int] = set()
        for number, size in events:
            if size:
                made.add(number)
                self.allocate(number, size)
            elif number in self.blocks:
                self.free(number)
        for number in made & self.blocks.keys():
            self.free(number)

    def allocate(self, number: int, size: int) -> None:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        if not self.keeps and size >= self.threshold:
            size = -(-size // PAGE) * PAGE
            self.blocks[number] = (None, size)
            self.mapped += size
        else:
            self.blocks[number] = self.place(size)
        self.peak = max(self.peak, self.held)

    def place(self, size: int) -> tuple[int, int]:
        index = bisect_left(self.by_size, (size, 0))
        if index == len(self.by_size):
            start = self.top
            self.top += size
            self.touched = max(self.touched, self.top)
            return start, size
        found, start = self.by_size[index]
        self.remove(start, found)
        if found - size >= SMALLEST:
            self.add(start + size, found - size)
            return start, size
        return start, found

    def free(self, number: int) -> None:
        start, size = self.blocks.pop(number)
        if start is None:
            self.mapped -= size
            if self.threshold < size <= LARGEST_THRESHOLD:
                self.threshold, self.trim = size, 2 * size
            return
        end = start + size
        if start in self.ends:
            before = self.ends[start]
            self.remove(before, start - before)
            start = before
        if end in self.starts:
            after = self.starts[end]
            self.remove(end, after)
            end += after
        if end >= self.top:
            self.top = start
            if not self.keeps and self.touched - self.top > self.trim:
                self.touched = self.top
        else:
            self.add(start, end - start)

    def add(self, start: int, size: int) -> None:
        insort(self.by_size, (size, start))
        self.starts[start], self.ends[start + size] = size, start

    def remove(self, start: int, size: int) -> None:
        del self.by_size[bisect_left(self.by_size, (size, start))]
        del self.starts[start], self.ends[start + size]
