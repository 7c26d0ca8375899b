"""Write docs/results.md, and the table in the README, from the JSON in benchmarks/figures.

python docs/results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "figures"
START, END = "<!-- results: docs/results.py -->", "<!-- end of results -->"


def main() -> None:
    """Write both."""
    radiology, counts = read("radiology"), read("parameter_counts")
    curve, speed, grpo = read("peer_curve"), read("merged_speed"), read("grpo")
    kto = read("kto")
    sections = [
        "# Results",
        "Every figure here is written by `docs/results.py` from `benchmarks/figures/*.json`, which "
        "the scripts in `benchmarks/` write. Machines are noisy: read ratios, not seconds. Nothing "
        "was measured on a GPU.",
        machine(radiology),
        "## Real radiology reports, on pocket",
        radiology_text(radiology),
        radiology_table(radiology["summary"]),
        "## The same run in TRL + peft",
        curve_text(curve),
        "## GRPO on arithmetic",
        grpo_text(grpo),
        grpo_table(grpo["runs"]),
        "## KTO on real reports",
        kto_text(kto),
        kto_table(kto["runs"]),
        "## A merged model's speed",
        speed_text(speed),
        "## What each method trains",
        "Counted on the meta device by attaching to each shape. A rank of 16 is a sixteenth of "
        "pocket's width of 256 and a 512th of a 70B model's, so the same adapter is a far larger "
        "share of pocket, where only IA3, prompts, norms and LoRA on few layers stay below 1%.",
        counts_table(counts["rows"]),
    ]
    (ROOT / "docs" / "results.md").write_text("\n\n".join(sections) + "\n")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    table = radiology_table(radiology["summary"])
    readme.write_text(f"{before}{START}\n{table}\n{END}{after}")


def read(name: str) -> dict[str, Any]:
    """Read one result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine(result: dict[str, Any]) -> str:
    """Describe the machine."""
    m = result["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items())
    return f"Machine: {m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB; {versions}."


def radiology_text(result: dict[str, Any]) -> str:
    """Say how it was measured."""
    flags = " ".join(repr(f) if " " in f else f for f in result["common"])
    seeds = max(row["seeds"] for row in result["summary"])
    base = result["summary"][0]
    return (
        f"Findings to impression, split 80/10/10 by uid, {seeds} seeds; loss in nats a token on "
        f"the test part, ROUGE-L on 100 reports of it. The base's loss is {base['base_loss']:.3f} "
        f"and its ROUGE-L {base['base_rouge_l']:.3f}; p is the largest over seeds of a paired "
        "permutation test against it (its floor is 0.0002). Two runs at a time, one thread each, "
        "so seconds compare methods with each other and nothing else; memory is the whole "
        "process.\n\n"
        f"```\ninlay train {flags}\n```\n\n"
        "`full`, `lora` and `qlora` have a learning rate picked by hand on the validation part (in "
        "the JSON); the others have the command's own. `lora` and `qlora` also adapt the embedding "
        "and the head, because pocket has never read a report; `lora, defaults` does not."
    )


def radiology_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of methods."""
    head = (
        "| method | loss (min-max) | over full | ROUGE-L | p | trained % | peak MiB | seconds |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(radiology_row(row) for row in rows)])


def radiology_row(r: dict[str, Any]) -> str:
    """Return one method's line."""
    return (
        f"| {r['method']} | {r['loss']:.3f} ({r['loss_min']:.3f}-{r['loss_max']:.3f}) "
        f"| {r['loss_over_full']:.3f} | {r['rouge_l']:.3f} | {r['largest_p_value']:.1e} "
        f"| {r['trainable_percent']:.3g} | {r['peak_memory_mib']} | {r['seconds']:.0f} |"
    )


def curve_text(result: dict[str, Any]) -> str:
    """Say how near the curves are."""
    runs = result["runs"]
    steps = len(runs[0]["inlay"])
    each = ", ".join(f"{r['largest_relative_difference']:.1e}" for r in runs)
    return (
        f"LoRA on pocket in fp32, real reports, {steps} logged steps, {len(runs)} seeds, both from "
        f"one saved start: the largest relative difference of the loss at any step is {each}."
    )


def grpo_text(result: dict[str, Any]) -> str:
    """Say what was rewarded, from what start."""
    warm, problems = result["warm_start"], result["problems"]
    right = warm["number_match"]
    keys = "\n".join(f"{key}: {json.dumps(value)}" for key, value in result["run"].items())
    return (
        "One- and two-step problems worded as GSM8K's. Pocket first trains for "
        f"{warm['steps']} supervised steps on worked answers, of {problems['warm']:,}, merged into "
        f"it: its likeliest answer is right in {right['tuned']['value']:.0%} of {right['rows']} "
        f"others ({right['base']['value']:.0%} before). Then {result['steps']} steps of GRPO on "
        f"{problems['rewarded']:,} other problems, where an answer is worth 1 if its last number "
        f"is right, and base against tuned on {problems['held_out']:,} that neither has read. "
        "*Drawn* answers are sampled as in training; p is of a paired permutation test (its floor "
        "is 0.0002); KL is KL(tuned || base) in nats a token. `benchmarks/results/grpo.py`.\n\n"
        f"```yaml\n{keys}\n```"
    )


def grpo_table(runs: list[dict[str, Any]]) -> str:
    """Return base against tuned, a line a seed."""
    head = (
        "| seed | reward of drawn answers | p | of the likeliest | p | KL | "
        "reward in training, tenth by tenth |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(grpo_row(run) for run in runs)])


def grpo_row(run: dict[str, Any]) -> str:
    """Return one seed's line."""
    cells = [str(run["seed"])]
    for name in ("sampled_reward", "reward"):
        cells += shift(run[name])
    rewards = run["reward_by_step"]
    tenths = [rewards[i * len(rewards) // 10 : (i + 1) * len(rewards) // 10] for i in range(10)]
    curve = " ".join(f"{sum(tenth) / len(tenth):.2f}" for tenth in tenths)
    return f"| {' | '.join([*cells, format(run['kl']['tuned']['value'], '.3f'), curve])} |"


def kto_text(result: dict[str, Any]) -> str:
    """Say what was labelled, and how the learning rate was found."""
    rows = {name: sum(counts.values()) for name, counts in result["rows"].items()}
    tried = ", ".join(
        f"{run['learning_rate']:g} ({run['auc']['tuned']['value']:.3f})" for run in result["tried"]
    )
    return (
        f"Pocket first reads {rows['warm']:,} reports, merged into it. Of {rows['labelled']:,} "
        "others every second has its own impression, labelled desirable, and the rest that of "
        "another report of about the same length, labelled undesirable; base against tuned on "
        f"{rows['held_out']:,} more. AUC is the chance that of a desirable and another answer the "
        "desirable one is the likelier a token; p is of a paired permutation test (its floor is "
        f"0.0002). The learning rate is the best of those tried on {rows['choosing']:,} rows of "
        f"their own (AUC in brackets): {tried}. `benchmarks/results/kto.py`."
    )


def kto_table(runs: list[dict[str, Any]]) -> str:
    """Return base against tuned, a line a seed."""
    head = (
        "| seed | AUC | p | loss | p | loss of desirable answers | ROUGE-L of written ones | p |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(kto_row(run) for run in runs)])


def kto_row(run: dict[str, Any]) -> str:
    """Return one seed's line."""
    auc, loss = shift(run["auc"]), shift(run["loss"])
    written = shift(run["rouge_l"])
    cells = [str(run["seed"]), *auc, *loss, shift(run["desirable_loss"])[0], *written]
    return f"| {' | '.join(cells)} |"


def shift(metric: dict[str, Any]) -> tuple[str, str]:
    """Return a metric of base and tuned, and the p of their difference."""
    base, tuned = metric["base"]["value"], metric["tuned"]["value"]
    return f"{base:.3f} -> {tuned:.3f}", f"{metric['p_value']:.2g}"


def speed_text(result: dict[str, Any]) -> str:
    """Say how fast a merged model is."""
    merged, null = result["merged_over_base"], result["base_over_base"]
    adapted = result["adapted_over_base"]
    return (
        f"Forward time over the base's, measured alternately, median of {result['alternations']} "
        f"(quartiles): merged {spread(merged)}; the base itself, measured again, {spread(null)}; "
        f"with the adapter attached {spread(adapted)}."
    )


def spread(found: dict[str, float]) -> str:
    """Return a median with its quartiles."""
    return f"{found['median']:.3f} ({found['q1']:.3f}-{found['q3']:.3f})"


def counts_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of counts, a column a shape."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    found = {(row["method"], row["shape"]): row for row in rows}
    lines = [f"| method | {' | '.join(shapes)} |", "|---" * (len(shapes) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [found[method, shape] for shape in shapes]
        shown = " | ".join(f"{c['trained']:,} ({c['percent']:.3g}%)" for c in cells)
        lines.append(f"| {method} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
