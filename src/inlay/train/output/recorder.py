"""metrics.jsonl, one line after another, and the events that a progress display draws."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.train.output.events import Event, OnEvent, peak_memory
from inlay.train.output.saving import saving

TIMINGS = ("tokens_per_second", "seconds", "memory_bytes")
"""The values in metrics.jsonl that two equal runs may differ in."""
RECENT_STEPS = 20
"""Speed and time left are of these last steps."""


class Recorder:
    """Writes losses to metrics.jsonl, averaged over `log_every` steps, and tells of each step."""

    def __init__(self, path: Path, log_every: int, on_event: OnEvent) -> None:
        self.path, self.log_every, self.on_event = path, log_every, on_event
        self.total_steps = 0
        self.waiting: list[dict[str, float]] = []
        self.tokens = 0
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.recent: deque[tuple[float, int]] = deque([(self.started, 0)], maxlen=RECENT_STEPS)

    @property
    def seconds(self) -> float:
        """Seconds the run has trained, interruptions left out."""
        return self.seconds_before + time.monotonic() - self.started

    def stage(self, message: str) -> None:
        self.on_event(Event("stage", message, seconds=self.seconds))

    def note(self, message: str) -> None:
        self.on_event(Event("note", message, seconds=self.seconds))

    def checkpoint(self, folder: Path, step: int) -> None:
        self.on_event(Event("checkpoint", str(folder), step, self.total_steps))

    def step(
        self,
        step: int,
        epoch: float,
        loss: float,
        learning_rate: float,
        norm: float,
        tokens: int,
        also: Mapping[str, float] | None = None,
    ) -> None:
        """Take in one optimiser step, and what its task measures beside the loss."""
        self.tokens += tokens
        self.waiting.append({"loss": loss, **(also or {})})
        self.recent.append((time.monotonic(), self.tokens))
        speed, seconds_left = self.pace(step)
        self.on_event(
            Event(
                "step",
                step=step,
                total_steps=self.total_steps,
                loss=loss,
                reward=(also or {}).get("reward"),
                learning_rate=learning_rate,
                grad_norm=norm,
                tokens_per_second=speed,
                memory_bytes=peak_memory(),
                seconds=self.seconds,
                seconds_left=seconds_left,
            )
        )
        if step % self.log_every == 0 or step in (1, self.total_steps):
            line: dict[str, object] = {"step": step, "epoch": epoch, **self.means()}
            line |= {"learning_rate": learning_rate, "grad_norm": norm, "tokens": self.tokens}
            self.write({**line, "tokens_per_second": speed, "memory_bytes": peak_memory()})
            self.waiting.clear()

    def means(self) -> dict[str, float]:
        """Return the mean of each value over the steps since the last line that have it."""
        names = dict.fromkeys(name for step in self.waiting for name in step)
        found = {name: [step[name] for step in self.waiting if name in step] for name in names}
        return {name: sum(values) / len(values) for name, values in found.items()}

    def pace(self, step: int) -> tuple[float, float]:
        """Return tokens a second, and the seconds left at the speed of the last steps."""
        (first, tokens), (last, _) = self.recent[0], self.recent[-1]
        seconds = max(last - first, 1e-9)
        steps = len(self.recent) - 1
        return (self.tokens - tokens) / seconds, seconds / steps * (self.total_steps - step)

    def evaluation(
        self, step: int, epoch: float, loss: float | None, also: Mapping[str, float] | None = None
    ) -> None:
        """Take in a held-out loss, if there is one, and what its task measures beside it."""
        more = {f"eval_{name}": value for name, value in (also or {}).items()}
        more |= {} if loss is None else {"eval_loss": loss}
        self.write({"step": step, "epoch": epoch, **more})
        self.on_event(
            Event(
                "evaluation",
                step=step,
                total_steps=self.total_steps,
                eval_loss=loss,
                reward=(also or {}).get("reward"),
                seconds=self.seconds,
            )
        )
        self.recent.clear()
        self.recent.append((time.monotonic(), self.tokens))

    def write(self, line: dict[str, object]) -> None:
        """Append one line and flush it to the disk."""
        with saving("a line of the metrics", self.path):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "seconds": self.seconds}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def start_over(self) -> None:
        with saving("the metrics", self.path):
            self.path.write_text("")

    def state(self) -> dict[str, object]:
        """Return what a resumed run needs to go on with the same file."""
        return {
            "bytes": self.path.stat().st_size if self.path.exists() else 0,
            "waiting": list(self.waiting),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def cut(self, size: int) -> None:
        """Truncate the file to this many bytes."""
        with saving("the metrics", self.path):
            self.path.touch()
            os.truncate(self.path, min(size, self.path.stat().st_size))

    def restore(self, state: Mapping[str, Any]) -> None:
        self.cut(state["bytes"])
        self.waiting = list(state["waiting"])
        self.tokens, self.seconds_before = state["tokens"], state["seconds"]
        self.started = time.monotonic()
        self.recent.clear()
        self.recent.append((self.started, self.tokens))


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Return the lines of a metrics.jsonl; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]
