"""Which fast paths are on: each has a name and computes what the plain path computes.

    with inlay.plain("attention", "loss"):      # these two off; all of them with no name
        model(**batch).loss.backward()

`INLAY_PLAIN=attention,loss` (or `all`) in the environment turns them off for a whole process.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad

from inlay.errors import UsageError, did_you_mean

hidden: Any = torch._C
PATHS = {
    "products": "frozen products as opaque operators, in the dtype this machine multiplies fastest",
    "norms": "RMS norms that keep their input alone for the backward pass",
    "gates": "gated feed-forward blocks that keep gate and up alone",
    "attention": "attention by row length, over packed rows without a mask",
    "loss": "output head and cross-entropy in chunks, at labelled positions, gradient in the "
    "forward pass",
    "last_layer": "the last block's feed-forward work at labelled positions only",
    "memory": "memory kept between steps instead of returned to the system",
    "native": "compiled C for products, quantising, dequantising and elementwise work",
    "triton": "Triton kernels on a GPU, for NF4 weights",
}
"""Name of each fast path -> what it does."""


def named(names: tuple[str, ...]) -> frozenset[str]:
    """Return the paths of these names, all for none or `all`; raise `UsageError` for others."""
    for name in names:
        if name not in PATHS and name != "all":
            raise UsageError(
                f"there is no fast path {name!r}; there are {', '.join(PATHS)}."
                f"{did_you_mean(name, PATHS)}"
            )
    return frozenset(PATHS) if not names or "all" in names else frozenset(names)


def from_environment() -> frozenset[str]:
    words = tuple(w.strip() for w in os.environ.get("INLAY_PLAIN", "").split(",") if w.strip())
    return named(words) if words else frozenset()


off = from_environment()
"""The paths that are off now, in every thread: a backward pass may run in another one."""


def is_on(name: str) -> bool:
    """Return whether a fast path is on; none is while a function transform looks at what runs."""
    return name not in off and not transformed()


def transformed() -> bool:
    """Return whether a function transform is at work: it knows PyTorch's own operators alone."""
    if torch.compiler.is_compiling():
        return False
    return hidden._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


@contextmanager
def as_the_process_began() -> Generator[None]:
    """Turn off inside the `with` block what the environment turns off, and nothing else."""
    global off
    before, off = off, from_environment()
    try:
        yield
    finally:
        off = before


@contextmanager
def plain(*names: str) -> Generator[None]:
    """Turn fast paths off inside the `with` block: those named, or all of them.

    >>> with plain("attention"):
    ...     is_on("attention"), is_on("loss")
    (False, True)
    """
    global off
    before, off = off, off | named(names)
    try:
        yield
    finally:
        off = before
