"""What the project set out to reach, and what was found: a line for each goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

NOT_YET = "not yet measured"
HALVES = {"_avx512bf16": "AVX512-BF16", "_amx": "AMX"}
"""What results on CPUs with bfloat16 arithmetic end in, and what they have."""
STOCK = {"bf16": "peft", "nf4": "peft + bitsandbytes"}
"""The peer of each storage, as it comes."""


@dataclass(frozen=True)
class Goal:
    """A goal of the project, and what was found."""

    what: str
    target: str
    found: str = NOT_YET
    met: bool | None = None
    in_readme: bool = False

    @property
    def verdict(self) -> str:
        """In words."""
        return "" if self.met is None else "yes" if self.met else "**no**"


def goals_table(goals: Sequence[Goal]) -> str:
    """Return the table."""
    rows = [f"| {g.what} | {g.target} | {g.found} | {g.verdict} |" for g in goals]
    return "\n".join(["| what | goal | measured | met |", "|---|---|---|---|", *rows])


def at_least(what: str, least: float, value: dict[str, Any] | None, **more: Any) -> Goal:
    """Return a goal that a ratio's median must reach."""
    target = f"≥ {least:g}x"
    if value is None:
        return Goal(what, target, **more)
    return Goal(what, target, times(value), value["median"] >= least, **more)


def share_goal(what: str, target: float, value: dict[str, Any] | None, most: bool) -> Goal:
    """Return a goal for a share, which must be reached or not be passed."""
    shown = f"{'≤' if most else '≥'} {target:.0%}"
    if value is None:
        return Goal(what, shown)
    median = value["median"]
    found = f"{median:.1%} ({value['q1']:.1%}-{value['q3']:.1%})"
    return Goal(what, shown, found, median <= target if most else median >= target)


def loss_goal(what: str, difference: float | None) -> Goal:
    """Return a goal for a final loss, which must be the peer's within half a percent."""
    if difference is None:
        return Goal(what, "within 0.5%")
    return Goal(what, "within 0.5%", f"{difference:+.3%}", abs(difference) <= 0.005)


def times(value: dict[str, Any]) -> str:
    """Return a ratio with its quartiles."""
    return f"{value['median']:.2f}x ({value['q1']:.2f}-{value['q3']:.2f})"


def all_goals(found: dict[str, Any]) -> list[Goal]:
    """Return every goal."""
    return [
        *step_goals(found, "bf16", 1.8, 1.25),
        *step_goals(found, "nf4", 1.8, 1.2),
        *halves_goals(found),
        *nf4_goals(found),
        *eight_bit_goals(found),
        *real_goals(found),
        *trunk_goals(found),
        *streaming_goals(found),
        plan_goal(found),
        *runs_goals(found),
        *growth_goals(found),
        Goal(
            "on a GPU: 8B and 70B, bf16 and NF4",
            "see below",
            "see below" if "gpu" in found else NOT_YET,
        ),
    ]


def step_goals(found: dict[str, Any], storage: str, stock: float, kept: float) -> list[Goal]:
    """Return the goals for a step of the 0.5B shape on 512 dense tokens."""
    case = cases(found).get(f"0.5B {storage} 512")
    peer, where = STOCK[storage], f"{storage.replace('nf4', 'NF4')} LoRA step, 0.5B, 512 tokens"
    first, second = ratio(case, "inlay", peer), ratio(case, "inlay", f"{peer}, allocator set")
    goals = [
        at_least(f"{where}: speed over {peer}", stock, first and first["speed"], in_readme=True),
        at_least(f"{where}: speed over {peer}, allocator set", kept, second and second["speed"]),
        loss_goal("the same, final loss", first and first["final_loss_difference"]),
    ]
    return goals + floor_goals(case, where, first) if storage == "bf16" else goals


def halves_goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goals for the same step on CPUs with bfloat16 arithmetic."""
    goals: list[Goal] = []
    for on, name in HALVES.items():
        case = cases(found, on).get("0.5B bf16 512")
        if case is None:
            continue
        cpu = named(found[f"speed_quick{on}"]["machine"], name)
        where = f"on {cpu}: bf16 LoRA step, 0.5B, 512 tokens"
        stock, kept = ratio(case, "inlay", "peft"), at_its_best(case)
        eight = ratio(case, "inlay, 8-bit compute", "inlay")
        share = case["contestants"]["inlay"]["share_of_gemm_floor"]
        goals += [
            at_least(f"{where}: speed over peft", 1.5, stock and stock["speed"], in_readme=True),
            at_least(
                f"{where}: speed over {kept['over'] if kept else 'peft, allocator set'}",
                1.25,
                kept and kept["speed"],
                in_readme=True,
            ),
            share_goal(f"{where}: share of the GEMM floor", 0.85, share, most=False),
            at_least(f"{where}: 8-bit compute over our own bf16", 1.3, eight and eight["speed"]),
        ]
    return goals


def named(machine: dict[str, Any], has: str) -> str:
    """Name a CPU by what it has; one that only stands in for it, by its maker and how too."""
    by = machine.get("stands_in_by")
    maker = "an Intel CPU" if "Intel" in machine["cpu"] else "a CPU"
    return (
        f"{maker} with {has} (limited to it by `ONEDNN_MAX_CPU_ISA={by}`)"
        if by
        else f"a CPU with {has}"
    )


def floor_goals(
    case: dict[str, Any] | None, where: str, over_stock: dict[str, Any] | None
) -> list[Goal]:
    """Return the goals for a step's memory and its share of the floor."""
    memory = Goal(
        f"{where}: memory above the weights, as a share of peft's", "≤ 0.25", in_readme=True
    )
    share = case["contestants"]["inlay"]["share_of_gemm_floor"] if case else None
    if over_stock is not None:
        value = over_stock["memory"]
        memory = replace(memory, found=f"{value:.2f}", met=value <= 0.25)
    return [memory, share_goal(f"{where}: share of the GEMM floor", 0.75, share, most=False)]


def nf4_goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goals for quantising and unpacking."""
    speed = found.get("nf4_speed")
    what = "quantising to NF4 over bitsandbytes, equal bytes"
    quantise = at_least(what, 30, speed and speed["quantise"]["speed"], in_readme=True)
    if speed and not speed["quantise"]["equal_bytes"]:
        quantise = Goal(what, quantise.target, f"{quantise.found}, other bytes", met=False)
    share = speed and speed["unpack"]["share_of_step"]
    return [quantise, share_goal("unpacking NF4, of a step of 512 tokens", 0.05, share, most=True)]


def eight_bit_goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goals for 8-bit compute."""
    dense, packed = (cases(found).get(f"0.5B {storage} 512") for storage in ("bf16", "nf4"))
    mine = "inlay, 8-bit compute"
    own, peer = ratio(dense, mine, "inlay"), ratio(packed, mine, "peft + bitsandbytes")
    return [
        at_least("8-bit compute over our own bf16", 1.4, own and own["speed"]),
        loss_goal("the same, final loss", own and own["final_loss_difference"]),
        at_least("8-bit compute from NF4 over peft + bitsandbytes", 2.5, peer and peer["speed"]),
    ]


def real_goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goals for real supervised data."""
    goals: list[Goal] = []
    for data, title in (("radiology", "radiology reports"), ("gsm8k", "GSM8K")):
        case = real_cases(found).get(data)
        goals += [
            at_least(f"{title}: examples/s over TRL + peft", 3.5, case and case["speed"],
                     in_readme=True),
            loss_goal("the same, held-out loss", case and case["held_out_loss_difference"]),
            at_least(f"{title}: 8-bit compute over our own bf16", 1.4,
                     case and case["eight_bits_speed"]),
            loss_goal("the same, held-out loss", case and case["eight_bits_loss_difference"]),
        ]  # fmt: skip
    return goals


def trunk_goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goal for a cached trunk."""
    cache = found.get("trunk_cache")
    what = "adapters on the top quarter with cache_trunk, speed over adapters on all layers"
    return [at_least(what, 2.2, cache and cache["top_cached_over_all"])]


def streaming_goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goals for streaming from disk."""
    results = found.get("streaming", {})
    peaks = [r["peak_rss_gb"] for name, r in results.items() if name.startswith("memory_32_")]
    speeds = [
        r["speed_of_resident_median"] for name, r in results.items() if name.startswith("speed_")
    ]
    memory = Goal("7B NF4 streamed from disk: peak memory of the process", "≤ 3 GB")
    speed = Goal("the same, 2,048 tokens a microbatch, of resident speed", "≥ 60%")
    if peaks:
        memory = replace(memory, found=f"{max(peaks):.2f} GB", met=max(peaks) <= 3)
    if speeds:
        speed = replace(speed, found=f"{min(speeds):.0%}", met=min(speeds) >= 0.6)
    return [memory, speed]


def plan_goal(found: dict[str, Any]) -> Goal:
    """Return the goal for planned memory."""
    what, target = "planned against measured peak memory", "within 5% over 24 cases"
    if "plan_table" not in found:
        return Goal(what, target)
    rows = found["plan_table"]["rows"]
    within = sum(abs(row["error"]) <= 0.05 for row in rows)
    worst = max(abs(row["error"]) for row in rows)
    shown = f"{within} of {len(rows)} within 5%; the worst {worst:.1%}"
    return Goal(what, target, shown, within == len(rows) >= 24)


def runs_goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goals for planned memory of whole runs, on each class of CPU that was measured."""
    goals = []
    for name in sorted(n for n in found if n.startswith("plan_runs")):
        errors = [row["error"] for row in found[name]["rows"]]
        within = sum(0 <= error <= 0.05 for error in errors)
        shown = f"{within} of {len(errors)} so; {min(errors):+.1%} to {max(errors):+.1%}"
        what = f"planned peak of `inlay train` against its own, {found[name]['machine']['class']}"
        target = "within 5%, never under, 24 cases"
        goals.append(Goal(what, target, shown, within == len(errors) >= 24))
    return goals


GROWTH = {
    "tokens": "tokens (attention grows with their square)",
    "rank": "rank",
    "depth": "layers",
}


def growth_goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goals for cost growth: how much of it a straight line explains."""
    growth = found.get("growth")
    if growth is None:
        return [Goal("time and memory against tokens, rank, layers, adapters", "linear")]
    goals = []
    for name, series in growth["series"].items():
        pair = [series[f"{what}_fit"]["linear_r_squared"] for what in ("seconds", "memory")]
        shown = f"R² of a line: time {pair[0]:.3f}, memory {pair[1]:.3f}"
        goals.append(Goal(f"growth with {GROWTH[name]}", "linear", shown, min(pair) >= 0.95))
    a = growth["adapters"]
    steps = [s["median"] for s in a["step_seconds"]]
    goals.append(
        Goal(
            f"a step with {a['points'][-1]:,} adapters attached, one active, over one attached",
            "1x", f"{steps[-1] / steps[0]:.2f}x", steps[-1] / steps[0] <= 1.1,
        )
    )  # fmt: skip
    return goals


def cases(found: dict[str, Any], on: str = "") -> dict[str, Any]:
    """Return the measured steps by name, the small ones first; the quick run's own count.

    `on`: what the names of results on a class of CPU end in.
    """
    measured = {
        case["case"]: case
        for run in (f"speed_full{on}", f"speed_quick{on}")
        for case in found.get(run, {}).get("cases", [])
    }
    in_order = sorted(measured.values(), key=lambda c: (c["shape"], c["tokens"], c["storage"]))
    return {case["case"]: case for case in in_order}


def real_cases(found: dict[str, Any]) -> dict[str, Any]:
    """Return the runs on real data by name; the full run's own, of more seeds, stand first."""
    return {
        case["data"]: case
        for run in ("real_data_quick", "real_data_full")
        for case in found.get(run, {}).get("cases", [])
    }


def at_its_best(case: dict[str, Any]) -> dict[str, Any] | None:
    """Return ours over peft with the allocator set, in the dtype that it is faster in there."""
    peers = ("peft, allocator set", "peft in float32, allocator set")
    found = [r for peer in peers if (r := ratio(case, "inlay", peer))]
    return min(found, key=lambda r: r["speed"]["median"], default=None)


def ratio(case: dict[str, Any] | None, of: str, over: str) -> dict[str, Any] | None:
    """Return one contestant over another, if both took part."""
    ratios = case["ratios"] if case else []
    return next((r for r in ratios if (r["of"], r["over"]) == (of, over)), None)
