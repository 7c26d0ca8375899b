"""How a training step's time and memory grow with tokens, rank, depth, and adapters attached.

    python -m benchmarks.memory.growth

Each point is a process of its own; the points of a series are measured in turns, so that a slow
minute falls on all of them. A series is fitted with y = a + b * x^p, the relative error least:
p = 1 is linear.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.machine import THREADS, spread, write
from benchmarks.lib.shapes import RANK, save_base, save_start, shape_config
from benchmarks.lib.turns import Worker

EXPONENTS = np.linspace(0.3, 2.5, 221)


@dataclass(frozen=True)
class Size:
    """What is measured."""

    shape: str
    layers: int
    vocab: int
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    depths: tuple[int, ...]
    adapters: tuple[int, ...]
    alternations: int


SIZES = {
    "quick": Size(
        "0.5B", 4, 16_384,
        tokens=(64, 128, 256, 512, 1024, 2048),
        ranks=(1, 4, 16, 64, 256),
        depths=(1, 2, 4, 8, 16, 24),
        adapters=(1, 10, 100, 1000),
        alternations=5,
    ),
    "smoke": Size("tiny", 2, 512, (16, 64), (1, 4), (1, 3), (1, 3), 2),
}  # fmt: skip
MIDDLE = 512
"""Tokens of the series that vary something else."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every series, print and write the fits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", dest="size", action="store_const", const="smoke")
    parser.set_defaults(size="quick")
    parser.add_argument("--output", help="name of the file in benchmarks/figures")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    middle = min(MIDDLE, max(size.tokens))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        series = {
            "tokens": measured(
                size.tokens, lambda n: spec(root, size, tokens=n, layers=size.layers), size
            ),
            "rank": measured(
                size.ranks,
                lambda r: spec(root, size, tokens=middle, layers=size.layers, rank=r),
                size,
            ),
            "depth": measured(
                size.depths, lambda n: spec(root, size, tokens=middle, layers=n), size
            ),
        }
        adapters = many_adapters(root, size)
    result = {
        "shape": size.shape, "layers": size.layers, "vocab": size.vocab, "threads": THREADS,
        "tokens": middle, "rank": RANK, "alternations": size.alternations,
        "series": series, "adapters": adapters,
    }  # fmt: skip
    for name, found in series.items():
        print(f"{name}: seconds {found['seconds_fit']}, memory {found['memory_fit']}")
    print(adapters)
    print(write(options.output or "growth", result))


def spec(root: Path, size: Size, *, tokens: int, layers: int, rank: int = RANK) -> dict[str, Any]:
    """Return a worker's request; make its base and adapter if they do not exist."""
    base, start = root / f"base-{layers}", root / f"start-{layers}-{rank}"
    if not base.exists():
        save_base(shape_config(size.shape, layers, size.vocab), base)
    if not start.exists():
        save_start(base, start, rank)
    return {
        "contestant": "inlay", "storage": "bf16", "base": str(base), "adapter": str(start),
        "tokens": tokens, "vocab": size.vocab, "seed": 0, "learning_rate": 1e-3,
    }  # fmt: skip


def measured(
    points: Sequence[int], spec_of: Callable[[int], dict[str, Any]], size: Size
) -> dict[str, Any]:
    """Measure one series."""
    with ExitStack() as stack:
        workers = {n: stack.enter_context(Worker("lib.step_worker", spec_of(n))) for n in points}
        for worker in workers.values():
            worker.ask(steps=1)
        rounds = [
            {n: worker.ask(steps=1) for n, worker in workers.items()}
            for _ in range(size.alternations)
        ]
    seconds = {n: [r[n]["seconds"][0] for r in rounds] for n in points}
    memory = [rounds[-1][n]["peak_bytes"] for n in points]
    return {
        "points": list(points),
        "seconds": [spread(seconds[n]) for n in points],
        "memory_bytes": memory,
        "seconds_fit": fit(points, [statistics.median(seconds[n]) for n in points]),
        "memory_fit": fit(points, memory),
    }


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Fit y = a + b * x^p and y = a + b * x; return p and how much of y each explains (R^2)."""
    errors = [power_fit(x, y, p)[0] for p in EXPONENTS]
    best = float(EXPONENTS[int(np.argmin(errors))])
    shown = {
        "exponent": best,
        "r_squared": power_fit(x, y, best)[1],
        "linear_r_squared": power_fit(x, y, 1.0)[1],
    }
    return {name: round(value, 4) for name, value in shown.items()}


def power_fit(x: Sequence[float], y: Sequence[float], exponent: float) -> tuple[float, float]:
    """Return the squared relative error of the best a + b * x^p, and its R^2."""
    values = np.asarray(y, dtype=float)
    columns = np.stack([np.ones(len(x)), np.asarray(x, dtype=float) ** exponent], axis=1)
    found = np.linalg.lstsq(columns / values[:, None], np.ones(len(x)), rcond=None)[0]
    left = values - columns @ found
    explained = 1 - float((left**2).sum() / ((values - values.mean()) ** 2).sum())
    return float(((left / values) ** 2).sum()), explained


def many_adapters(root: Path, size: Size) -> dict[str, Any]:
    """Measure one model with more and more adapters on it, one of them active."""
    request = spec(root, size, tokens=min(64, max(size.tokens)), layers=min(2, size.layers))
    with Worker("lib.adapters_worker", {**request, "rank": 1}) as worker:
        found = [worker.ask(adapters=n, steps=size.alternations) for n in size.adapters]
    return {
        "points": list(size.adapters),
        "layers": min(2, size.layers),
        "rank": 1,
        "tokens": request["tokens"],
        "attach_seconds_each": [f["attach_seconds"] for f in found],
        "use_seconds": [f["use_seconds"] for f in found],
        "save_seconds": [f["save_seconds"] for f in found],
        "step_seconds": [spread(f["step_seconds"]) for f in found],
        "held_bytes": [f["held_bytes"] for f in found],
    }


if __name__ == "__main__":
    main()
