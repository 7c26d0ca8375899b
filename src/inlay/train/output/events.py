"""What a run tells while it goes: the command draws it, the library may listen too."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Event:
    """One thing that happened in a run; numbers that do not apply are None.

    `stage` begins a part of the run and `note` says something worth knowing: both in `message`.
    `step` follows an optimiser step, `evaluation` a held-out loss, `checkpoint` a save.
    """

    kind: Literal["stage", "note", "step", "evaluation", "checkpoint"]
    message: str = ""
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    reward: float | None = None
    """Of a step, or of an evaluation, where the task has one."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    seconds: float = 0.0
    seconds_left: float | None = None


OnEvent = Callable[[Event], None]


def peak_memory() -> int:
    """Return the most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
