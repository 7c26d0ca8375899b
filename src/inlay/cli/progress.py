"""Live progress of a run: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self, TextIO

from inlay.cli import show

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from inlay.train.output.events import Event

QUIET_SECONDS = 5
"""Without a terminal, the minimum time between two lines for steps."""


def progress(stream: TextIO | None = None) -> PlainProgress | LiveProgress:
    """Return the display of a run's events on stderr; stdout holds results only."""
    to = stream or sys.stderr
    return LiveProgress(to) if to.isatty() else PlainProgress(to)


class PlainProgress:
    """One line for each stage, evaluation and note, and for a step every few seconds."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.last = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, event: Event) -> None:
        if event.kind in ("stage", "note"):
            self.stage(event.message)
        elif event.kind == "evaluation" and event.eval_loss is not None:
            self.stage(f"{place(event)}  held-out loss {event.eval_loss:.4f}")
        elif event.kind == "evaluation" and event.reward is not None:
            self.stage(f"{place(event)}  held-out reward {event.reward:.4f}")
        elif event.kind == "step" and self.due(event):
            self.last = event.seconds
            self.stage("  ".join([place(event), *(f"{k} {v}" for k, v in figures(event).items())]))

    def stage(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def due(self, event: Event) -> bool:
        """Whether to write this step: the first, the last, and one every few seconds."""
        waited = event.seconds - self.last >= QUIET_SECONDS
        return waited or event.step == event.total_steps

    def working(self, what: str, done: int, total: int) -> None:
        if done == total:
            self.stage(f"{what}: {total} rows")


class LiveProgress:
    """A panel with a bar, the latest figures and the curve of the loss."""

    def __init__(self, stream: TextIO):
        from rich.console import Console

        self.console = Console(file=stream, highlight=False)
        self.live: Live | None = None
        self.doing = ""
        self.step: Event | None = None
        self.eval_loss: float | None = None
        self.losses: list[float] = []

    def __enter__(self) -> Self:
        from rich.live import Live

        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, event: Event) -> None:
        if event.kind == "stage":
            self.stage(event.message)
        elif event.kind == "note":
            self.console.print(event.message, markup=False)
        elif event.kind == "evaluation":
            self.eval_loss = event.eval_loss
        elif event.kind == "step":
            self.step = event
            if event.loss is not None:
                self.losses.append(event.loss)
        self.draw()

    def working(self, what: str, done: int, total: int) -> None:
        self.stage(f"{what}: {done} of {total} rows")

    def stage(self, text: str) -> None:
        self.doing, self.step = text, None
        self.draw()

    def draw(self) -> None:
        if self.live is not None:
            self.live.update(self.panel())

    def panel(self) -> RenderableType:
        from rich.console import Group
        from rich.padding import Padding
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        lines: list[RenderableType] = [Text(self.doing)]
        if self.step is not None:
            bar = ProgressBar(total=self.step.total_steps, completed=self.step.step)
            lines.append(Padding(bar, 0))  # a bar alone does not end its line
            facts = figures(self.step)
            if self.eval_loss is not None:
                facts["held-out loss"] = f"{self.eval_loss:.4f}"
            lines.append(Text("   ".join(f"{name} {value}" for name, value in facts.items())))
            lines.append(Text(sparkline(self.losses), style="green"))
        title = place(self.step) if self.step else "inlay"
        return Panel(Group(*lines), title=title, title_align="left", expand=True)


def place(event: Event) -> str:
    return f"step {event.step}/{event.total_steps}"


def figures(event: Event) -> dict[str, str]:
    known = {
        "loss": (event.loss, "{:.4f}".format),
        "reward": (event.reward, "{:.4f}".format),
        "lr": (event.learning_rate, "{:.2e}".format),
        "tokens/s": (event.tokens_per_second, "{:,.0f}".format),
        "memory": (event.memory_bytes, show.size),
        "left": (event.seconds_left, show.duration),
    }
    return {name: text(value) for name, (value, text) in known.items() if value is not None}


def sparkline(values: list[float], width: int = 60) -> str:
    latest = values[-width:]
    if len(latest) < 2:
        return ""
    low, high = min(latest), max(latest)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (value - low) / span))] for value in latest)
