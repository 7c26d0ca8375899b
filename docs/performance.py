"""Write docs/performance.md, its pictures, and the README's table, from benchmarks/figures.

    python docs/performance.py

A figure whose measurement is not there is "not yet measured", and nothing else.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drawing import COLOURS, Bar, Curve, Panel, bars, panels
from goals import (
    HALVES,
    NOT_YET,
    STOCK,
    Goal,
    all_goals,
    cases,
    goals_table,
    ratio,
    real_cases,
    times,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.cases import FULL  # noqa: E402

RESULTS = ROOT / "benchmarks" / "figures"
PICTURES = ROOT / "docs" / "pictures"
START, END = "<!-- performance: docs/performance.py -->", "<!-- end of performance -->"
MIB = 2**20
ON_THIS_PAGE = (
    "speed_", "real_data_", "nf4_speed", "native_kernels", "growth", "plan_table", "streaming",
    "trunk_cache", "gpu", "plan_runs", "self_proof",
)  # fmt: skip
"""How the names begin of the results that are shown here."""


def main() -> None:
    """Write all three."""
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    PICTURES.mkdir(exist_ok=True)
    goals = all_goals(found)
    parts = [
        "# Performance",
        "Written by `docs/performance.py` from the JSON in `benchmarks/figures`. The contestants "
        "take turns on one machine, one at a time, and a ratio is the median over "
        "turns, with the quartiles in brackets. Machines are noisy: read ratios, not seconds.",
        "## Goals",
        goals_table(goals),
        *steps_section(found),
        *real_section(found),
        *nf4_section(found),
        *kernels_section(found),
        *growth_section(found),
        *plan_section(found),
        *runs_section(found),
        *proofs_section(found),
        *gpu_section(found),
        "## Machines",
        *machines(found),
        "## Measure again",
        "<!-- not run: make runs these, and this test is one of what it runs -->\n"
        "```bash\n"
        "make bench        # minutes: the goals' cases on this CPU, and this page\n"
        "make bench-full   # every case on this CPU: hours\n"
        "make bench-gpu    # on a machine with a GPU\n"
        "```",
    ]
    (ROOT / "docs" / "performance.md").write_text("\n\n".join(parts) + "\n")
    write_readme(goals)


def write_readme(goals: Sequence[Goal]) -> None:
    """Put the goals that were measured between the README's markers."""
    readme = ROOT / "README.md"
    before, mark, rest = readme.read_text().partition(START)
    if mark:
        _, _, after = rest.partition(END)
        shown = goals_table([goal for goal in goals if goal.in_readme])
        brief, limited = re.subn(r" \(limited to it by `[^`]+`\)", "", shown)
        if limited:
            brief += "\n\nThe CPU with AVX512-BF16 is a newer one, limited to those instructions."
        readme.write_text(f"{before}{START}\n{brief}\n{END}{after}")


def steps_section(found: dict[str, Any]) -> list[str]:
    """Describe the training steps."""
    measured = cases(found)
    if not measured:
        return ["## A training step", NOT_YET.capitalize() + "."]
    some = next(iter(measured.values()))
    (PICTURES / "speed.svg").write_text(speed_picture(measured))
    return [
        "## A training step",
        f"{some['method']}; AdamW; every token labelled, one sequence, {some['threads']} threads; "
        "the same random weights, tokens and adapter for all, each contestant a process of its "
        "own. *Allocator set* means that glibc keeps freed memory (`MALLOC_MMAP_THRESHOLD_`, "
        "`MALLOC_TRIM_THRESHOLD_`). *Of the floor*: every exact step needs certain matrix "
        "products. The floor is their time on this machine, for these shapes, in the faster of "
        "fp32 and bf16, measured in the same minute; the column is the floor over the step's "
        "time. Memory is the peak of the process above what it held with model and adapter "
        "loaded. The bitsandbytes peer neither upcasts nor recomputes, which makes it faster than "
        "the set-up in its documentation.",
        "![speed over the stock peer](pictures/speed.svg)",
        "On a CPU without bfloat16 arithmetic. PyTorch multiplies bfloat16 more slowly than "
        "float32 there, so peft must be faster in float32, which was not measured:",
        steps_table(measured),
        *left_out(measured),
        *unmeasured(measured),
        *halves_section(found),
    ]


def halves_section(found: dict[str, Any]) -> list[str]:
    """Describe the steps on CPUs with bfloat16 arithmetic, class by class."""
    parts: list[str] = []
    for on, name in HALVES.items():
        measured = cases(found, on)
        shown = [steps_table(measured), *left_out(measured)] if measured else [NOT_YET + "."]
        parts += [f"### On a CPU with {name}", *shown]
    return parts


def speed_picture(measured: dict[str, Any]) -> str:
    """Draw each contestant's speed over the stock peer's."""
    groups = []
    for name, case in measured.items():
        stock = case["contestants"][STOCK[case["storage"]]]["tokens_per_second"]["values"]
        group = []
        for who, c in case["contestants"].items():
            own = c["tokens_per_second"]["values"]
            low, middle, high = quartiles([a / b for a, b in zip(own, stock, strict=True)])
            colour = COLOURS[0] if who.startswith("inlay") else COLOURS[5]
            group.append(Bar(who, middle, low, high, colour))
        groups.append((f"{name} tokens, {case['layers']} layers", group))
    return bars(groups, "x", mark=1.0)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.25), at(0.5), at(0.75)


def steps_table(measured: dict[str, Any]) -> str:
    """Return every contestant of every case."""
    rows = [
        f"| {name} | {case['layers']} | {who} | {c['tokens_per_second']['median']:.0f} "
        f"| {over(case, who)} | {c['share_of_gemm_floor']['median']:.0%} "
        f"| {c['peak_above_weights_bytes'] / MIB:,.0f} | {c['weights_bytes'] / MIB:,.0f} "
        f"| {c['final_loss']:.4f} |"
        for name, case in measured.items()
        for who, c in case["contestants"].items()
    ]
    head = (
        "| shape, storage, tokens | layers | contestant | tokens/s | ours over it | of the floor "
        "| MiB above the weights | weights MiB | final loss |"
    )
    return "\n".join([head, "|---" * 9 + "|", *rows])


def over(case: dict[str, Any], who: str) -> str:
    """Return our speed over a contestant's."""
    found = ratio(case, "inlay", who)
    return times(found["speed"]) if found else ""


def left_out(measured: dict[str, Any]) -> list[str]:
    """Say who did not take part, and why."""
    reasons = {
        f"{who} ({case['storage']})": why
        for case in measured.values()
        for who, why in case["skipped"].items()
    }
    if not reasons:
        return []
    return ["Left out: " + "; ".join(f"{who}: {why}" for who, why in reasons.items()) + "."]


def unmeasured(measured: dict[str, Any]) -> list[str]:
    """Name the cases of `speed.py --full` that were not run."""
    missing = [case.name for case in FULL if case.name not in measured]
    return [f"{NOT_YET.capitalize()}: {', '.join(missing)}."] if missing else []


def real_section(found: dict[str, Any]) -> list[str]:
    """Describe the runs on real data."""
    measured = real_cases(found)
    if not measured:
        return ["## Real supervised data", NOT_YET.capitalize() + "."]
    some = next(iter(measured.values()))
    rows = [
        f"| {name} | {case['rows']} | {len(case['runs'])} "
        f"| {case['examples_per_second']['inlay']:.2f} "
        f"| {case['examples_per_second']['TRL + peft']:.2f} | {times(case['speed'])} "
        f"| {case['speed_in_all']:.2f}x | {case['memory']:.2f} "
        f"| {case['held_out_loss']['inlay']:.4f} | {case['held_out_loss']['TRL + peft']:.4f} "
        f"| {times(case['eight_bits_speed'])} "
        f"| {case['held_out_loss']['inlay, 8-bit compute']:.4f} |"
        for name, case in measured.items()
    ]
    head = (
        "| data | rows | seeds | inlay examples/s | TRL + peft | by turns | in all | memory ratio "
        "| our held-out loss | theirs | 8 bits over ours | its held-out loss |"
    )
    return [
        "## Real supervised data",
        f"`inlay train` against TRL's SFTTrainer with peft, both as their documentation has them "
        f"(theirs: padded batches in random order, activations recomputed, bf16 autocast). One "
        f"epoch of the same rows in batches of {some['batch_size']}, prompt not trained on, "
        f"lengths as in the data, the same adapter at the start, learning rate "
        f"{some['learning_rate']:g}; {some['layers']} layers of the {some['shape']} shape, "
        f"vocabulary {some['vocab']:,}, bf16 random weights, tokeniser {some['tokenizer']}. The "
        "two tools order the rows differently, so the rows of a turn differ in length; *in all* "
        "is total time over total time.",
        "\n".join([head, "|---" * 12 + "|", *rows]),
    ]


def nf4_section(found: dict[str, Any]) -> list[str]:
    """Describe quantising and unpacking."""
    if "nf4_speed" not in found:
        return []
    q, u = found["nf4_speed"]["quantise"], found["nf4_speed"]["unpack"]
    same = "the same bytes" if q["equal_bytes"] else "OTHER BYTES"
    return [
        "## NF4",
        f"Quantising a {q['size']:,} x {q['size']:,} bf16 matrix, double quantisation on: "
        f"{q['inlay_seconds']['median'] * 1e3:.1f} ms, bitsandbytes "
        f"{q['bitsandbytes_seconds']['median'] * 1e3:.0f} ms, {times(q['speed'])}, {same}. "
        f"Unpacking every weight of the {u['shape']} shape for a forward and a backward pass: "
        f"{u['unpacking_seconds']['median'] * 1e3:.0f} ms of a step of "
        f"{u['step_seconds']['median']:.2f} s at {u['tokens']} tokens.",
    ]


def kernels_section(found: dict[str, Any]) -> list[str]:
    """Describe the C kernels by themselves, each against others' code for the same values."""
    if "native_kernels" not in found:
        return []
    kernels = found["native_kernels"]
    rows = [
        f"| {name} | {contest[ours]['median_ms']:.2f} | {against(contest, ours)} |"
        for name, contest in kernels.items()
        if isinstance(contest, dict)
        for ours in [next(iter(contest))]
        if ours.startswith("inlay")
    ]
    return [
        "## C kernels",
        f"`benchmarks/speed/native_kernels.py`, {kernels['native']}, {kernels['threads']} threads, "
        f"{kernels['rounds']} rounds in turns: medians, and the ratio's range. A product's weight "
        "is bfloat16. *Tile by tile* is Inlay without the kernel; *a float32 weight* is torch's "
        "product with a weight of twice the bytes.",
        "\n".join(
            [
                "| what | ours, ms | others, ms, and theirs over ours |",
                "|---|---|---|",
                *rows,
            ]
        ),
    ]


def against(contest: dict[str, Any], ours: str) -> str:
    """Return the others of a contest: their time, and its ratio to ours with the range."""
    ratios = {
        other: value
        for pair, value in contest.items()
        for other, _, over in [pair.partition(" / ")]
        if over == ours and not other.startswith("inlay")
    }
    return "; ".join(
        f"{other} {contest[other]['median_ms']:.2f}, {value['median']:.2f}x "
        f"({value['range'][0]:.2f}-{value['range'][1]:.2f})"
        for other, value in ratios.items()
    )


def growth_section(found: dict[str, Any]) -> list[str]:
    """Describe and draw how cost grows."""
    if "growth" not in found:
        return ["## Growth", NOT_YET.capitalize() + "."]
    growth = found["growth"]
    (PICTURES / "growth.svg").write_text(growth_picture(growth))
    rows = [
        f"| {name} | {what} | {f['exponent']:.2f} | {f['r_squared']:.4f} "
        f"| {f['linear_r_squared']:.4f} |"
        for name, series in growth["series"].items()
        for what, f in (("time", series["seconds_fit"]), ("memory", series["memory_fit"]))
    ]
    a = growth["adapters"]
    return [
        "## Growth",
        f"{growth['shape']} shape, bf16, {growth['layers']} layers, vocabulary "
        f"{growth['vocab']:,}, rank {growth['rank']} and {growth['tokens']} tokens, except for the "
        "value that grows. Each point is a process of its own; the points of a series take "
        f"turns, {growth['alternations']} each. The fit is y = a + b·x^p.",
        "![growth](pictures/growth.svg)",
        "\n".join(["| with | of | p | R² | R² of a line |", "|---|---|---|---|---|", *rows]),
        f"Adapters on one model ({a['layers']} layers, rank {a['rank']}), one active:",
        adapters_table(a),
    ]


def growth_picture(growth: dict[str, Any]) -> str:
    """Draw every series: time and memory, and what many adapters cost."""
    shown = []
    for name, label in (("tokens", "tokens"), ("rank", "rank"), ("depth", "layers")):
        series = growth["series"][name]
        x = series["points"]
        seconds = [s["median"] for s in series["seconds"]]
        memory = [b / MIB for b in series["memory_bytes"]]
        shown.append(
            Panel(f"Time against {name}", label, "seconds a step", [Curve("", x, seconds)])
        )
        shown.append(Panel(f"Memory against {name}", label, "MiB above weights",
                           [Curve("", x, memory)]))  # fmt: skip
    a = growth["adapters"]
    shown.append(
        Panel(
            "Time against adapters attached", "adapters", "seconds",
            [
                Curve("a step", a["points"], [s["median"] for s in a["step_seconds"]]),
                Curve("attach one", a["points"], a["attach_seconds_each"]),
                Curve("use", a["points"], a["use_seconds"]),
                Curve("save one", a["points"], a["save_seconds"]),
            ],
        )
    )  # fmt: skip
    held = [max(b, 1) / MIB for b in a["held_bytes"]]
    shown.append(Panel("Memory against adapters attached", "adapters", "MiB held",
                       [Curve("", a["points"], held)]))  # fmt: skip
    return panels(shown)


def adapters_table(a: dict[str, Any]) -> str:
    """Return what each number of adapters costs."""
    columns = zip(
        a["points"], a["attach_seconds_each"], a["use_seconds"], a["save_seconds"],
        a["step_seconds"], a["held_bytes"], strict=True,
    )  # fmt: skip
    rows = [
        f"| {n:,} | {attach * 1e3:.1f} | {use * 1e3:.1f} | {save * 1e3:.0f} "
        f"| {step['median']:.3f} | {held / MIB:.0f} |"
        for n, attach, use, save, step, held in columns
    ]
    head = "| adapters | attach one, ms | use, ms | save one, ms | step, s | held, MiB |"
    return "\n".join([head, "|---" * 6 + "|", *rows])


def plan_section(found: dict[str, Any]) -> list[str]:
    """Show planned against measured memory."""
    if "plan_table" not in found:
        return []
    rows = [
        f"| {r['method']} | {r['storage']}{', 8-bit compute' if r.get('eight_bits') else ''} "
        f"| {r['dtype']} | {r['length']} | {r['policy']} "
        f"| {r['planned']['total'] / MIB:,.0f} | {r['measured'] / MIB:,.0f} | {r['error']:+.1%} |"
        for r in found["plan_table"]["rows"]
    ]
    head = "| method | storage | dtype | tokens | policy | planned MiB | measured MiB | error |"
    return ["## Planned memory", "\n".join([head, "|---" * 8 + "|", *rows])]


def runs_section(found: dict[str, Any]) -> list[str]:
    """Show planned against measured memory of whole runs, on each class of CPU."""
    head = (
        "| model | method | storage | dtype | rows | length, batch | planned MB | held MB | error |"
    )
    parts: list[str] = []
    for name in sorted(n for n in found if n.startswith("plan_runs")):
        rows = [
            f"| {r['model']} | {r['method']} | {r['storage']} | {r['dtype']} | {r['rows']} "
            f"| {r['length']}, {r['batch']} | {r['planned'] / 1e6:,.0f} "
            f"| {r['measured'] / 1e6:,.0f} | {r['error']:+.1%} |"
            for r in found[name]["rows"]
        ]
        parts += [f"On a CPU with {of_class(found[name]['machine'])}:"]
        parts += ["\n".join([head, "|---" * 9 + "|", *rows])]
    told = (
        "The peak of the process of `inlay train`, its comparison included, against the plan made "
        "before: real rows, one thread, a new process each (`benchmarks/memory/plan_runs.py`)."
    )
    return ["## Planned memory of whole runs", told, *parts] if parts else []


def of_class(m: dict[str, Any]) -> str:
    """Name a machine's class of CPU, and what made it stand in for another."""
    kind, by = m.get("class", "no bfloat16 arithmetic"), m.get("stands_in_by")
    return f"{kind}, set by `ONEDNN_MAX_CPU_ISA={by}`" if by else kind


def proofs_section(found: dict[str, Any]) -> list[str]:
    """Show what it costs that fast paths prove themselves."""
    if "self_proof" not in found:
        return []
    rows = [
        f"| {r['model']} | {r['dtype']} | {r['proof_seconds'] / r['run_seconds']:.1%} "
        f"| {r['known_seconds'] / r['run_seconds']:.2%} |"
        for r in found["self_proof"]["rows"]
    ]
    some = found["self_proof"]["rows"][0]
    told = (
        f"Processor time of the proofs, as a share of {some['steps']} training steps of "
        f"{some['tokens']} tokens on a model of six small layers. A proof runs once for each class "
        "of model in a process."
    )
    head = "| model | dtype | first attach | a later one |"
    return [
        "## What the checks of fast paths cost",
        told,
        "\n".join([head, "|---" * 4 + "|", *rows]),
    ]


def gpu_section(found: dict[str, Any]) -> list[str]:
    """Show what was measured on a GPU."""
    if "gpu" not in found:
        return ["## On a GPU", NOT_YET.capitalize() + "."]
    measured = [c for c in each_case(found["gpu"]) if c.get("contestants")]
    rows = [
        f"| {case['case']} | {case.get('layers', '')} | {who} "
        f"| {c['tokens_per_second']['median']:,.0f} "
        f"| {c['share_of_gemm_floor']['median']:.0%} | {c['peak_bytes'] / 1e9:.1f} "
        f"| {c['final_loss']:.4f} | {targets(c)} |"
        for case in measured
        for who, c in case["contestants"].items()
    ]
    head = (
        "| case | layers | contestant | tokens/s | of the floor | peak GB | final loss "
        "| goals met |"
    )
    return ["## On a GPU", "\n".join([head, "|---" * 8 + "|", *rows])]


def each_case(gpu: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cases of the GPU's results, which are kept by name."""
    kept = gpu["cases"]
    return list(kept.values()) if isinstance(kept, dict) else kept


def targets(contestant: dict[str, Any]) -> str:
    """Say which of a contestant's goals were met."""
    met = contestant.get("targets_met", {})
    return ", ".join(f"{what}: {'yes' if yes else '**no**'}" for what, yes in met.items())


def machines(found: dict[str, Any]) -> list[str]:
    """Describe every machine that a figure on this page comes from."""
    described: dict[str, list[str]] = {}
    for name, result in sorted(found.items()):
        if name.startswith(ON_THIS_PAGE):
            described.setdefault(machine(result["machine"]), []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in described.items()] or [NOT_YET]


def machine(m: dict[str, Any]) -> str:
    """Describe one machine."""
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items())
    if "device" in m:
        return f"{m['device']}; {versions}."
    return f"{m['cpu']} ({of_class(m)}), {m['cores']} cores, {m['memory_gib']} GiB; {versions}."


if __name__ == "__main__":
    main()
