"""Speed and memory of a training step, ours and peers', alternately on one machine.

    python -m benchmarks.speed.steps [--full]

Every contestant trains the same adapter on the same weights and the same tokens, in a process of
its own; one works at a time. An alternation gives each a turn of a few optimiser steps and, in the
same minute, measures the machine's matrix products. Ratios are of one alternation; their median
and quartiles are reported. The quick run is the 0.5B shape at 512 tokens; `--full` adds a 1.5B
shape and other lengths. Results of a CPU with bfloat16 arithmetic are in files of their own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.lib.contestants import CONTESTANTS, Contestant
from benchmarks.lib.machine import THREADS, cases_before, class_of_cpu, spread, write
from benchmarks.lib.shapes import (
    ALPHA,
    RANK,
    floor_flops,
    head_product,
    layer_products,
    save_base,
    save_start,
    shape_config,
)
from benchmarks.lib.turns import SkippedError, Worker
from benchmarks.speed.cases import FULL, QUICK, SMOKE, Case

LEARNING_RATE = 1e-3
WARM_UP = 2
"""Steps of each contestant before anything is measured."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case asked for; the results are written after each, beside those of others."""
    options = parsed(arguments)
    cases = {"quick": QUICK, "full": FULL, "smoke": SMOKE}[options.size]
    if options.layers:
        cases = [replace(case, layers=options.layers) for case in cases]
    cases = [case for case in cases if any(part in case.name for part in options.only)]
    output = options.output or f"speed_{options.size}{class_of_cpu()}"
    results = cases_before(output, {case.name for case in cases})
    for case in cases:
        results.append(measured(case, options.alternations, options.steps))
        print(shown(results[-1]), flush=True)
        print(write(output, {"cases": results}), flush=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    for size in ("quick", "full", "smoke"):
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size)
    parser.set_defaults(size="quick")
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps of a turn")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains this")
    parser.add_argument("--layers", type=int, help="blocks of every shape, instead of its own")
    parser.add_argument("--output", help="name of the file in benchmarks/figures")
    return parser.parse_args(arguments)


def measured(case: Case, alternations: int, steps: int) -> dict[str, Any]:
    """Run one case and return what is known of every contestant."""
    config = shape_config(case.shape, case.layers, case.vocab)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        base, start = Path(folder) / "base", Path(folder) / "start"
        save_base(config, base)
        save_start(base, start)
        spec = {
            "base": str(base), "adapter": str(start), "storage": case.storage,
            "tokens": case.tokens, "vocab": config.vocab_size, "seed": 0,
            "learning_rate": LEARNING_RATE,
        }  # fmt: skip
        workers, skipped = started(case.storage, spec, stack)
        products = [*layer_products(config), head_product(config)]
        gemm = stack.enter_context(
            Worker("lib.gemm_worker", {"products": products, "tokens": case.tokens})
        )
        gemm.ask(measure=True)
        warm = {name: worker.ask(steps=WARM_UP) for name, worker in workers.items()}
        rounds = [alternation(workers, gemm, steps, i) for i in range(alternations)]
    flops = floor_flops(config, case.tokens)
    found = {
        name: summary(name, warm, rounds, case.tokens, flops, worker.ready["weights_bytes"])
        for name, worker in workers.items()
    }
    return {
        "case": case.name,
        **asdict(case),
        "layers": config.num_hidden_layers,
        "vocab": config.vocab_size,
        "method": f"LoRA rank {RANK}, alpha {ALPHA}, all linear layers of the blocks",
        "alternations": alternations,
        "steps_of_a_turn": steps,
        "threads": THREADS,
        "floor_flops": flops,
        "gemm_flops_per_second": {
            dtype: spread([r["gemm"][dtype] for r in rounds]) for dtype in ("float32", "bfloat16")
        },
        "contestants": found,
        "ratios": ratios(found, CONTESTANTS, case.storage),
        "skipped": skipped,
    }


def started(
    storage: str, spec: dict[str, Any], stack: ExitStack
) -> tuple[dict[str, Worker], dict[str, str]]:
    """Start every contestant of a storage; return the workers, and why others do not take part."""
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    for (held_as, name), contestant in CONTESTANTS.items():
        if held_as != storage:
            continue
        try:
            worker = Worker("lib.step_worker", {**spec, "contestant": name}, contestant.environment)
            workers[name] = stack.enter_context(worker)
        except SkippedError as reason:
            skipped[name] = str(reason)
            print(f"{name} is left out: {reason}", flush=True)
    return workers, skipped


def alternation(
    workers: dict[str, Worker], gemm: Worker, steps: int, number: int
) -> dict[str, dict[str, Any]]:
    """Give each a turn, every second time in the opposite order."""
    names = list(workers) if number % 2 == 0 else list(workers)[::-1]
    turns = {name: workers[name].ask(steps=steps) for name in names}
    return {**turns, "gemm": gemm.ask(measure=True)}


def summary(
    name: str,
    warm: dict[str, dict[str, Any]],
    rounds: list[dict[str, dict[str, Any]]],
    tokens: int,
    flops: float,
    weights: int,
) -> dict[str, Any]:
    """Return one contestant's speed, memory, share of the floor and losses."""
    seconds = [statistics.mean(r[name]["seconds"]) for r in rounds]
    best = [max(r["gemm"]["float32"], r["gemm"]["bfloat16"]) for r in rounds]
    losses = [loss for turn in (warm[name], *(r[name] for r in rounds)) for loss in turn["losses"]]
    return {
        "seconds_a_step": spread(seconds),
        "tokens_per_second": spread([tokens / s for s in seconds]),
        "share_of_gemm_floor": spread(
            [flops / rate / s for rate, s in zip(best, seconds, strict=True)]
        ),
        "peak_above_weights_bytes": rounds[-1][name]["peak_bytes"],
        "weights_bytes": weights,
        "losses": losses,
        "final_loss": losses[-1],
    }


def ratios(
    found: dict[str, dict[str, Any]],
    known: dict[tuple[str, str], Contestant],
    storage: str,
) -> list[dict[str, Any]]:
    """Return ours over every other contestant: speed, memory, final loss."""
    mine = [name for name in found if known[storage, name].is_ours]
    return [
        compared(a, found[a], b, found[b])
        for a in mine
        for b in found
        if b != a and (b not in mine or a != "inlay")
    ]


def compared(a: str, ours: dict[str, Any], b: str, other: dict[str, Any]) -> dict[str, Any]:
    """Return one contestant over another, alternation by alternation."""
    pairs = zip(
        ours["tokens_per_second"]["values"], other["tokens_per_second"]["values"], strict=True
    )
    differences = [abs(x - y) / y for x, y in zip(ours["losses"], other["losses"], strict=True)]
    return {
        "of": a,
        "over": b,
        "speed": spread([x / y for x, y in pairs]),
        "memory": ours["peak_above_weights_bytes"] / other["peak_above_weights_bytes"],
        "final_loss_difference": differences[-1],
        "largest_loss_difference": max(differences),
    }


def shown(result: dict[str, Any]) -> str:
    """Return one case as a few lines."""
    lines = [f"{result['case']} tokens, {result['layers']} layers, vocabulary {result['vocab']}"]
    for name, c in result["contestants"].items():
        lines.append(
            f"  {name:34} {c['seconds_a_step']['median']:8.3f} s a step "
            f"{c['tokens_per_second']['median']:8.1f} tokens/s "
            f"{c['peak_above_weights_bytes'] / 2**20:7.0f} MiB "
            f"{c['share_of_gemm_floor']['median']:6.1%} of the floor, loss {c['final_loss']:.4f}"
        )
    for r in result["ratios"]:
        s = r["speed"]
        lines.append(
            f"  {r['of']} over {r['over']}: {s['median']:.2f}x ({s['q1']:.2f}-{s['q3']:.2f}), "
            f"memory {r['memory']:.2f}, final loss {r['final_loss_difference']:.2e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
