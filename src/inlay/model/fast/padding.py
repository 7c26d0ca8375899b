"""Which lengths to give a model, so that a CPU does not compile a kernel for each."""

from __future__ import annotations

from typing import Any

from torch import nn

MULTIPLE = 32


def length_multiple(model: nn.Module) -> int:
    """Return what to pad row lengths to a multiple of: 32 on a CPU, else 1.

    oneDNN compiles a kernel for every new shape and keeps it: lengths as they come double the
    memory of a small model, and slow it. A context that is no multiple of 32 is left alone.
    """
    config: Any = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None) or MULTIPLE
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    return MULTIPLE if on_cpu and context % MULTIPLE == 0 else 1
