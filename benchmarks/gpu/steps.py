"""Speed and memory of a training step on a GPU, ours and peers', alternately on one machine.

    python -m benchmarks.gpu.steps [--cases "8B bf16,8B nf4"] [--seconds 500] [--smoke]

Every contestant trains the same adapter on the same random weights and tokens, in a process of
its own; one works at a time. An alternation gives each a turn of a few steps after a warm-up and
measures the GEMM rate in the same minute. Ratios are of one alternation; medians and quartiles are
reported. Results are written after every case, into those that are there from the same device, so
that a run can be made of several commands. `--list` prints the cases; a case stops early, and says
so, when its share of `--seconds` is spent.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from benchmarks.gpu.models import config_of
from benchmarks.lib.machine import FIGURES, spread
from benchmarks.lib.shapes import ALPHA, RANK, floor_flops
from benchmarks.lib.turns import SkippedError, Worker, WorkerError

PACKAGES = (
    "inlay", "torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger_kernel",
    "unsloth",
)  # fmt: skip
PEERS = ("peft", "peft, recomputing", "peft + TRL", "peft + Liger", "peft + Liger, recomputing")
STEPS, WARM_UP = 4, 2
"""Steps of a turn that are timed, and steps before them."""


@dataclass(frozen=True)
class Case:
    """One comparison: a shape, a storage of the frozen weights, a length, and who takes part."""

    name: str
    shape: str
    storage: str
    tokens: int
    contestants: tuple[str, ...]
    layers: int | None = None
    policy: str = "keep-all"
    """Inlay's activation policy; the name of a peer says its own."""
    release: bool = False
    """Whether a contestant frees its model after its turn, for the next one's."""
    target: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """Contestant -> least tokens per second, most bytes."""


MINE = ("inlay", "inlay, 8-bit compute")


def small(shape: str) -> list[Case]:
    """Return the cases of a small shape: three lengths, both storages."""
    everyone = (*MINE, *PEERS, "peft, compiled", "unsloth")
    return [
        Case(f"{shape} {storage} {tokens}", shape, storage, tokens, everyone)
        for storage in ("bf16", "nf4")
        for tokens in (128, 512, 2048)
    ]


def large(storage: str, least: float) -> Case:
    """Return the case of the 8B shape; its models take turns on the GPU."""
    target = {"inlay": {"tokens_per_second": least}}
    everyone = (*MINE, *PEERS, "unsloth")
    return Case(f"8B {storage}", "8B", storage, 4096, everyone, release=True, target=target)


RESIDENT, STREAMED = "inlay, packed", "inlay, streamed"
PEERS_70B = ("peft, recomputing", "peft + Liger, recomputing", "unsloth")
CASES = [
    large("bf16", 18_000),
    large("nf4", 16_000),
    Case(
        "70B nf4",
        "70B",
        "nf4",
        4096,
        (RESIDENT, STREAMED),
        policy="offload",
        target={
            RESIDENT: {"tokens_per_second": 2_000, "peak_bytes": 40e9},
            STREAMED: {"peak_bytes": 10e9},
        },
    ),
    *(
        Case(f"70B nf4 peers, {n} layers", "70B", "nf4", 4096, PEERS_70B, layers=n, release=True)
        for n in (8, 16)
    ),
    *small("0.5B"),
    *small("1.5B"),
    Case("kernels", "8B", "nf4", 4096, ("kernels",)),
]
"""Peers at 70B run on a few layers, since dense weights of all do not fit; see `extrapolated`."""
SMOKE = [
    Case("smoke bf16", "tiny", "bf16", 16, ("inlay", "peft + TRL", "unsloth")),
    Case("smoke nf4", "tiny llama", "nf4", 16, ("inlay", "peft"), release=True),
    Case("smoke packed", "tiny llama", "nf4", 16, (RESIDENT, STREAMED), policy="layer-inputs"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen cases; the results are written after each."""
    options = parsed(arguments)
    chosen = selected(SMOKE if options.smoke else CASES, options.cases)
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("There is no GPU here, so nothing was measured. `--smoke` runs on a CPU.")
    device = "cpu" if options.smoke else "cuda"
    path = options.output or (Path(gettempdir()) if options.smoke else FIGURES) / "gpu.json"
    results = earlier(path, device)
    ends = time.monotonic() + options.seconds
    for number, case in enumerate(chosen):
        share = (ends - time.monotonic()) / (len(chosen) - number)
        if share < 20 and not options.smoke:
            print(f"{case.name}: left out, {options.seconds} seconds are spent", flush=True)
            continue
        results[case.name] = measured(changed(case, options), device, options, share)
        print(shown(results[case.name]), flush=True)
        write(path, device, results)
    print(path)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="names, or their beginnings, with commas")
    parser.add_argument("--list", action="store_true", help="print the cases and do no more")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps of a turn")
    parser.add_argument("--seconds", type=float, default=6 * 3600, help="of all cases together")
    parser.add_argument("--tokens", type=int, help="instead of each case's own")
    parser.add_argument("--policy", help="activation policy of ours, instead of each case's own")
    parser.add_argument("--contestants", help="only these, with semicolons")
    parser.add_argument("--output", type=Path, help="instead of figures/gpu.json here")
    return parser.parse_args(arguments)


def selected(cases: list[Case], wanted: str) -> list[Case]:
    """Return the cases whose names begin with one of the words; all for none."""
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    idle = [word for word in words if not any(case.name.startswith(word) for case in cases)]
    if idle:
        sys.exit(f"no case begins with {idle[0]!r}; there are: {'; '.join(c.name for c in cases)}")
    return [c for c in cases if not words or any(c.name.startswith(word) for word in words)]


def changed(case: Case, options: argparse.Namespace) -> Case:
    """Return the case as the command line changes it; its name then says so."""
    name, new = case.name, {}
    for option in ("tokens", "policy"):
        value = getattr(options, option)
        if value and value != getattr(case, option):
            name, new = f"{name}, {option} {value}", {**new, option: value}
    if options.contestants:
        new["contestants"] = tuple(options.contestants.split(";"))
    return replace(case, name=name, **new)


def measured(case: Case, device: str, options: argparse.Namespace, share: float) -> dict[str, Any]:
    """Run one case within its share of the time; return what is known of every contestant."""
    ends = time.monotonic() + share
    with ExitStack() as stack:
        workers, skipped = started(case, device, stack)
        if "kernels" in workers:
            return {"case": case.name, **workers["kernels"].ask(measure=True), "skipped": skipped}
        rounds: list[dict[str, dict[str, Any]]] = []
        while len(rounds) < options.alternations and time.monotonic() < ends and workers:
            rounds.append(alternation(case, workers, skipped, options.steps, len(rounds)))
    config: Any = config_of(asdict(case))
    flops = floor_flops(config, case.tokens)
    found = {name: summary(name, case, rounds, flops) for name in workers}
    return {
        "case": case.name,
        **{key: value for key, value in asdict(case).items() if key not in ("name", "contestants")},
        "contestants_wanted": case.contestants,
        "layers": config.num_hidden_layers,
        "method": f"LoRA rank {RANK}, alpha {ALPHA}, all linear layers of the blocks",
        "alternations": len(rounds),
        "alternations_wanted": options.alternations,
        "steps_of_a_turn": options.steps,
        "floor_flops": flops,
        "contestants": found,
        "ratios": [compared(a, b, found) for a in found if ours(a) for b in found if b != a],
        "skipped": skipped,
    }


def started(case: Case, device: str, stack: ExitStack) -> tuple[dict[str, Worker], dict[str, str]]:
    """Start the contestants; return the workers, and why others do not take part."""
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    common = {**asdict(case), "device": device, "seed": 0}
    for name in case.contestants:
        try:
            worker = Worker("gpu.worker", {**common, "contestant": name})
            workers[name] = stack.enter_context(worker)
            print(f"{case.name}: {name} is built, {worker.ready}", flush=True)
        except (SkippedError, WorkerError) as reason:
            skipped[name] = str(reason)
            print(f"{case.name}: {name} is left out: {reason}", flush=True)
    return workers, skipped


def alternation(
    case: Case, workers: dict[str, Worker], skipped: dict[str, str], steps: int, number: int
) -> dict[str, dict[str, Any]]:
    """Give each a turn, every second time in the opposite order; one that fails is out."""
    turns: dict[str, dict[str, Any]] = {}
    warm = WARM_UP if number == 0 or case.release else 1
    for name in list(workers) if number % 2 == 0 else list(workers)[::-1]:
        try:
            turns[name] = workers[name].ask(warm=warm, steps=steps)
        except WorkerError as reason:
            skipped[name] = str(reason)
            del workers[name]
            print(f"{case.name}: {name} is out: {reason}", flush=True)
    return turns


def summary(
    name: str, case: Case, rounds: list[dict[str, dict[str, Any]]], flops: float
) -> dict[str, Any]:
    """Return one contestant's speed, memory, share of the GEMM rate and losses."""
    turns = [r[name] for r in rounds]
    seconds = [sum(t["seconds"]) / len(t["seconds"]) for t in turns]
    rates = [t["gemm_flops_per_second"] for t in turns]
    speed = spread([case.tokens / s for s in seconds])
    peak = max(t["peak_bytes"] for t in turns)
    losses = turns[0]["losses"] if case.release else [x for t in turns for x in t["losses"]]
    target = case.target.get(name, {})
    reached = {"tokens_per_second": speed["median"], "peak_bytes": -peak}
    least = {what: -x if what == "peak_bytes" else x for what, x in target.items()}
    return {
        "seconds_a_step": spread(seconds),
        "tokens_per_second": speed,
        "gemm_flops_per_second": spread(rates),
        "share_of_gemm_floor": spread([flops / r / s for r, s in zip(rates, seconds, strict=True)]),
        "weights_bytes": turns[0]["weights_bytes"],
        "peak_bytes": peak,
        "peak_above_weights_bytes": peak - turns[0]["weights_bytes"],
        "losses": losses,
        "final_loss": losses[-1],
        "targets_met": {what: reached[what] >= x for what, x in least.items()},
    }


def compared(a: str, b: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return one contestant over another, alternation by alternation."""
    x, y = found[a], found[b]
    pairs = zip(x["tokens_per_second"]["values"], y["tokens_per_second"]["values"], strict=True)
    return {
        "of": a,
        "over": b,
        "speed": spread([p / q for p, q in pairs]),
        "peak": x["peak_bytes"] / y["peak_bytes"] if y["peak_bytes"] else None,
        "final_loss_difference": abs(x["final_loss"] - y["final_loss"]) / y["final_loss"],
    }


def ours(name: str) -> bool:
    """Say whether a contestant is ours."""
    return name.startswith("inlay")


def extrapolated(few: dict[str, Any], more: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return peers' seconds and bytes at `layers`, from two runs with fewer: linear in depth."""
    first, last = few["layers"], more["layers"]
    steps = (layers - first) / (last - first)
    out: dict[str, Any] = {}
    for name in few["contestants"].keys() & more["contestants"].keys():
        a, b = few["contestants"][name], more["contestants"][name]
        x, y = a["seconds_a_step"]["median"], b["seconds_a_step"]["median"]
        p, q = a["peak_bytes"], b["peak_bytes"]
        out[name] = {
            "tokens_per_second": few["tokens"] / (x + (y - x) * steps),
            "peak_bytes": p + (q - p) * steps,
        }
    return {"layers": layers, "from_layers": [first, last], "contestants": out}


def earlier(path: Path, device: str) -> dict[str, Any]:
    """Return the cases that were measured before on the same device."""
    if not path.exists():
        return {}
    known = json.loads(path.read_text())
    return known["cases"] if known["machine"]["device"] == described(device)["device"] else {}


def write(path: Path, device: str, results: dict[str, Any]) -> None:
    """Write what is known so far."""
    peers = [case for name, case in results.items() if name.startswith("70B nf4 peers")]
    peers.sort(key=lambda case: case["layers"])
    whole = {"70B nf4": extrapolated(*peers, layers=80)} if len(peers) == 2 else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": described(device), "cases": results, "extrapolated": whole}
    path.write_text(json.dumps(content, indent=1) + "\n")


def described(device: str) -> dict[str, Any]:
    """Describe the device and the versions on the machine."""
    gpu: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        gpu = {
            "device": p.name,
            "memory_bytes": p.total_memory,
            "multiprocessors": p.multi_processor_count,
            "compute_capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda,
        }
    return {**gpu, "python": platform.python_version(), "versions": versions()}


def versions() -> dict[str, str]:
    """Return every package's version, or that it is not installed."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def shown(result: dict[str, Any]) -> str:
    """Return one case as a few lines."""
    if "table" in result:
        return "\n".join(f"  {row}" for row in result["table"])
    lines = [
        f"{result['case']}: {result['layers']} layers, {result['tokens']} tokens, "
        f"{result['alternations']} of {result['alternations_wanted']} alternations"
    ]
    for name, c in result["contestants"].items():
        lines.append(
            f"  {name:28} {c['tokens_per_second']['median']:9.1f} tokens/s, "
            f"peak {c['peak_bytes'] / 1e9:6.2f} GB, {c['share_of_gemm_floor']['median']:6.1%} of "
            f"the floor, loss {c['final_loss']:.4f} {c['targets_met'] or ''}"
        )
    for r in result["ratios"]:
        s = r["speed"]
        lines.append(f"  {r['of']} / {r['over']}: {s['median']:.2f} ({s['q1']:.2f}-{s['q3']:.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
