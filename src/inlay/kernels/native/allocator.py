"""Memory that stays in the process between training steps instead of going back to the kernel.

PyTorch's CPU tensors get a heap of their own (`tensor_memory.cpp`) where there is a C++ compiler;
elsewhere glibc is told to keep what is freed, whose heap grows over the first steps.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from functools import cache

from inlay.kernels.native.build import MEMORY, SWITCH, built

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""mallopt's parameters, from malloc.h."""
LARGEST = 2**31 - 1
KEPT = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: LARGEST, TOP_PAD: 64 << 20}
DEFAULTS = {MMAP_THRESHOLD: 128 << 10, TRIM_THRESHOLD: 128 << 10, TOP_PAD: 128 << 10}
RANGE = 4
"""Addresses reserved for the tensors' heap, in units of the machine's memory."""
changed: set[str] = set()
"""`glibc` while its options are not the defaults."""


def keep_memory() -> str | None:
    """Keep freed tensors' memory until `release_memory`; return None, or why that is impossible."""
    heap = tensor_heap()
    if heap is None:
        return keep_in_glibc()
    size = RANGE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    refused = heap.inlay_keep_tensors(ctypes.c_int64(size))
    if refused == 2:
        return "PyTorch's CPU tensors have another allocator already"
    if refused:
        return keep_in_glibc()
    trim()
    return None


def keep_in_glibc() -> str | None:
    changed.add("glibc")
    return set_options(KEPT)


def release_memory() -> str | None:
    """Return free memory to the kernel, now and from now on; None when done, or why not.

    PyTorch's tensors have their own allocator again. Tensors that live on stay where they are, and
    each gives its memory to the kernel when it is freed; the reserved addresses, which hold no
    memory, stay reserved. Where glibc's options were changed, one difference from a fresh process
    is left: the size from which a block is mapped by itself stays at 128 KiB and grows no more.
    """
    heap = tensor_heap()
    if heap is not None:
        heap.inlay_release_tensors()
    reason = set_options(DEFAULTS) if "glibc" in changed else None
    changed.clear()
    return_free_memory()
    return reason


def return_free_memory() -> None:
    heap = tensor_heap()
    if heap is not None:
        heap.inlay_return_pages()
    trim()


def trim() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@cache
def tensor_heap() -> ctypes.CDLL | None:
    """Return the heap for PyTorch's CPU tensors; None off Linux, without a compiler, or if off."""
    if platform.system() != "Linux" or os.environ.get(SWITCH, "").lower() in ("0", "off"):
        return None
    try:
        return ctypes.CDLL(str(built(MEMORY)))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None


def set_options(options: dict[int, int]) -> str | None:
    if platform.libc_ver()[0] != "glibc":
        return f"the C library is not glibc but {platform.libc_ver()[0] or platform.system()}"
    libc = ctypes.CDLL(None)
    refused = [name for name, size in options.items() if libc.mallopt(name, size) != 1]
    return f"glibc refused the options {refused}" if refused else None
