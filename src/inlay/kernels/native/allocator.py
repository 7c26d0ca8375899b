"""glibc's allocator: keep freed memory between steps instead of returning it to the kernel."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""mallopt's parameters, from malloc.h."""
LARGEST = 2**31 - 1
KEPT = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: LARGEST, TOP_PAD: 64 << 20}
DEFAULTS = {MMAP_THRESHOLD: 128 << 10, TRIM_THRESHOLD: 128 << 10, TOP_PAD: 128 << 10}


def keep_memory() -> str | None:
    """Keep freed blocks up to 2 GiB in the process, so that the next step faults no page in.

    For the whole process, until `release_memory`. Peak memory does not change; memory after the
    peak stays as large. Returns None when done, or why it was not.
    """
    return set_options(KEPT)


def release_memory() -> str | None:
    """Return free memory to the kernel, now and from now on; None when done, or why not.

    The one difference from a fresh process: the size from which a block is mapped by itself stays
    at glibc's 128 KiB and grows no more.
    """
    reason = set_options(DEFAULTS)
    if reason is None:
        ctypes.CDLL(None).malloc_trim(0)
    return reason


def set_options(options: dict[int, int]) -> str | None:
    """Set mallopt's options; return None when done, or why not."""
    if platform.libc_ver()[0] != "glibc":
        return f"the C library is not glibc but {platform.libc_ver()[0] or platform.system()}"
    libc = ctypes.CDLL(None)
    refused = [name for name, size in options.items() if libc.mallopt(name, size) != 1]
    return f"glibc refused the options {refused}" if refused else None
