"""Examples a second on real supervised data: `inlay train` against TRL + peft, in turns.

    python -m benchmarks.speed.real_data [--full]

Radiology findings to impression and GSM8K question to answer, lengths as they come, the prompt
not trained on. All sides train one epoch of the same rows from the same adapter with the same
hyperparameters, in batches of 8; TRL + peft as their documentation sets them up, ours as
`inlay train` is, and once more with the frozen products in 8 bits. All pause after every few
steps, so that they run in turns. The held-out loss at the end is of the same rows, by the same
code.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo_data.reports import generate_reports

from benchmarks.lib.machine import PROBLEMS, REPORTS, THREADS, spread, write
from benchmarks.lib.shapes import ALPHA, RANK, save_base, save_start, shape_config
from benchmarks.lib.turns import Worker
from inlay.model.load.folder import EMBEDDED

OURS, IN_8_BITS, PEER = SIDES = ("inlay", "inlay, 8-bit compute", "TRL + peft")
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
MAX_LENGTH = 1024
WARM_UP = 2
"""Steps of each side before anything is measured; they are part of its run."""
HELD_OUT_ROWS = 64


@dataclass(frozen=True)
class Size:
    """The size of a measurement."""

    shape: str
    layers: int
    vocab: int
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    alternations: int
    steps: int
    """Optimiser steps of a turn."""


SIZES = {
    "quick": Size("0.5B", 6, 16_384, ("radiology", "gsm8k"), (0,), 5, 3),
    "full": Size("0.5B", 6, 16_384, ("radiology", "gsm8k"), (0, 1, 2), 5, 4),
    "smoke": Size("tiny", 2, 4096, ("generated",), (0,), 2, 1),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all sides on every data set and seed; the results are written after each data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    for name in SIZES:
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name)
    parser.set_defaults(size="quick")
    parser.add_argument("--only", default="", help="data sets whose name contains this")
    parser.add_argument("--output", help="name of the file in benchmarks/figures")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    results: list[dict[str, Any]] = []
    for data in size.data:
        if options.only in data:
            results.append(measured(data, size))
            print(shown(results[-1]), flush=True)
            print(write(options.output or f"real_data_{options.size}", {"cases": results}))


def measured(data: str, size: Size) -> dict[str, Any]:
    """Run all sides on one data set for every seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_base(shape_config(size.shape, size.layers, size.vocab), folder / "base")
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(EMBEDDED["pocket"] / file, folder / "base" / file)
        steps = WARM_UP + size.alternations * size.steps
        found = rows(data, steps * BATCH_SIZE + HELD_OUT_ROWS)
        write_rows(folder / "train.jsonl", found[HELD_OUT_ROWS:])
        write_rows(folder / "held_out.jsonl", found[:HELD_OUT_ROWS])
        runs = [run(folder, size, steps, seed) for seed in size.seeds]
    return {
        **asdict(size),
        "data": data,
        "tokenizer": "pocket's, of 4,096 tokens",
        "method": f"LoRA rank {RANK}, alpha {ALPHA}, all linear layers of the blocks",
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "rows": steps * BATCH_SIZE,
        "threads": THREADS,
        "runs": runs,
        **pooled(runs, size),
    }


def rows(data: str, count: int) -> list[dict[str, str]]:
    """Return rows as prompt and completion."""
    if data == "radiology":
        with REPORTS.open(newline="") as file:
            reports = [r for r in csv.DictReader(file) if r["findings"] and r["impression"]]
        found = [(f"Findings: {r['findings']}\nImpression:", r["impression"]) for r in reports]
    elif data == "gsm8k":
        problems = [json.loads(line) for line in PROBLEMS.read_text().split("\n") if line]
        found = [(f"Question: {p['question']}\nAnswer:", p["answer"]) for p in problems]
    else:
        made = generate_reports(count, seed=0)
        found = [(f"Findings: {r.findings}\nImpression:", r.impression) for r in made]
    return [{"prompt": p, "completion": f" {c}"} for p, c in found[:count]]


def write_rows(path: Path, found: list[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def run(folder: Path, size: Size, steps: int, seed: int) -> dict[str, Any]:
    """Run all sides once, in turns."""
    start = folder / f"start-{seed}"
    save_start(folder / "base", start, seed=seed)
    spec = {
        "base": str(folder / "base"), "adapter": str(start), "seed": seed,
        "train": str(folder / "train.jsonl"), "held_out": str(folder / "held_out.jsonl"),
        "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "max_length": MAX_LENGTH,
        "warm_up": WARM_UP, "steps": steps,
    }  # fmt: skip
    workers: dict[str, Worker] = {}
    try:
        for side in SIDES:
            output = str(folder / f"{side} {seed}")
            workers[side] = Worker(
                "lib.real_worker", {**spec, "contestant": side, "output": output}
            )
        turns = [alternation(workers, size.steps, i) for i in range(size.alternations)]
        ends = {side: worker.ask(steps=0) for side, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    examples = size.steps * BATCH_SIZE
    sides = {
        side: {
            "examples_per_second": spread([examples / t[side]["seconds"] for t in turns]),
            "seconds": sum(t[side]["seconds"] for t in turns),
            "peak_above_weights_bytes": turns[-1][side]["peak_bytes"],
            **ends[side],
        }
        for side in SIDES
    }
    return {"seed": seed, "sides": sides}


def alternation(workers: dict[str, Worker], steps: int, number: int) -> dict[str, dict[str, Any]]:
    """Give each side a turn, every second time in the opposite order."""
    names = SIDES if number % 2 == 0 else SIDES[::-1]
    return {name: workers[name].ask(steps=steps) for name in names}


def pooled(runs: list[dict[str, Any]], size: Size) -> dict[str, Any]:
    """Return figures over all seeds, and ratios of Inlay to the peer and to Inlay in 8 bits."""
    sides = {side: [run["sides"][side] for run in runs] for side in SIDES}
    examples = len(runs) * size.alternations * size.steps * BATCH_SIZE
    rates = {name: examples / sum(r["seconds"] for r in side) for name, side in sides.items()}
    losses = {
        name: statistics.mean(r["held_out_loss"] for r in side) for name, side in sides.items()
    }
    return {
        "examples_per_second": rates,
        "held_out_loss": losses,
        "speed": spread(speeds(sides[OURS], sides[PEER])),
        "speed_in_all": rates[OURS] / rates[PEER],
        "memory": sides[OURS][0]["peak_above_weights_bytes"]
        / sides[PEER][0]["peak_above_weights_bytes"],
        "held_out_loss_difference": losses[OURS] / losses[PEER] - 1,
        "eight_bits_speed": spread(speeds(sides[IN_8_BITS], sides[OURS])),
        "eight_bits_loss_difference": losses[IN_8_BITS] / losses[OURS] - 1,
    }


def speeds(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[float]:
    """Return one side's speed over another's, alternation by alternation."""
    rates = (
        [x for r in side for x in r["examples_per_second"]["values"]] for side in (mine, theirs)
    )
    return [x / y for x, y in zip(*rates, strict=True)]


def shown(result: dict[str, Any]) -> str:
    """Return one data set's result as a few lines."""
    each = ", ".join(f"{n} {v:.2f} examples/s" for n, v in result["examples_per_second"].items())
    speed = result["speed"]
    return (
        f"{result['data']}, {result['rows']} rows, {len(result['runs'])} seeds: {each}\n"
        f"  {speed['median']:.2f}x ({speed['q1']:.2f}-{speed['q3']:.2f}), in all "
        f"{result['speed_in_all']:.2f}x; memory {result['memory']:.2f}; held-out loss "
        f"{result['held_out_loss']}, difference {result['held_out_loss_difference']:.2%}\n"
        f"  8 bits {result['eight_bits_speed']['median']:.2f}x, loss "
        f"{result['eight_bits_loss_difference']:+.2%}"
    )


if __name__ == "__main__":
    main()
