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
        "Written by `docs/results.py` from the JSON in `benchmarks/figures`, which the scripts in "
        "`benchmarks/` write. Machines are noisy: read ratios, not seconds. Nothing ran on a "
        "GPU.",
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
        "Counted by attaching to a model of each shape on the meta device. Rank 16 is 1/16 of "
        "the width of pocket (256) and 1/512 of that of the 70B model, so the same adapter is a "
        "far larger share of pocket: there only IA3, prompts, norms and LoRA on few layers stay "
        "below 1%.",
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
        f"Findings to impression, split 80/10/10 by uid, {seeds} seeds. The loss is in nats a "
        "token on the test part, ROUGE-L on 100 reports of it. The base has a loss of "
        f"{base['base_loss']:.3f} and a ROUGE-L of {base['base_rouge_l']:.3f}; p is that of a "
        "paired permutation test against the base (0.0002 is the lowest it can be), the largest "
        "over seeds. Two runs at a time, one thread each: seconds only compare the methods with "
        "each other. Memory is that of the whole process.\n\n"
        "<!-- not run: benchmarks/results/radiology.py runs it, on data that are not in the "
        f"repository -->\n```bash\ninlay train {flags}\n```\n\n"
        "The learning rate of `full`, `lora` and `qlora` was chosen by hand on the validation part "
        "(it is in the JSON); the others use that of the command. `lora` and `qlora` also adapt "
        "the embedding and the head, because pocket was not trained on reports; `lora, defaults` "
        "does not."
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
        f"the same saved start. The largest relative difference of the loss at a step is {each}."
    )


def grpo_text(result: dict[str, Any]) -> str:
    """Say what was rewarded, from what start."""
    warm, problems = result["warm_start"], result["problems"]
    right = warm["number_match"]
    keys = "\n".join(f"{key}: {json.dumps(value)}" for key, value in result["run"].items())
    return (
        "Problems of one and two steps, worded like those of GSM8K. First pocket trains for "
        f"{warm['steps']} supervised steps on {problems['warm']:,} worked answers, and the adapter "
        f"is merged: then the likeliest answer is right for {right['tuned']['value']:.0%} of "
        f"{right['rows']} other problems ({right['base']['value']:.0%} before). That model trains "
        f"for {result['steps']} steps of GRPO on {problems['rewarded']:,} further problems, where "
        "the reward is 1 if the last number is right. Base and tuned are compared on "
        f"{problems['held_out']:,} problems that neither was trained on. *Drawn* answers are "
        "sampled as in training; p is that of a paired permutation test (0.0002 is the lowest it "
        "can be); KL is KL(tuned || base) in nats a token. `benchmarks/results/grpo.py`.\n\n"
        f"<!-- not run: the keys of benchmarks/results/grpo.py -->\n```yaml\n{keys}\n```"
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
        f"First pocket trains on {rows['warm']:,} reports, and the adapter is merged. Then KTO on "
        f"{rows['labelled']:,} other reports: half have their own impression, labelled desirable, "
        "half that of another report of about the same length, labelled undesirable. Base and "
        f"tuned are compared on {rows['held_out']:,} more. AUC is the chance that a desirable "
        "answer is more likely, per token, than an undesirable one; p is that of a paired "
        "permutation test (0.0002 is the lowest it can be). The learning rate is the best on "
        f"{rows['choosing']:,} rows of their own (AUC in brackets): {tried}. "
        "`benchmarks/results/kto.py`."
    )


def kto_table(runs: list[dict[str, Any]]) -> str:
    """Return base against tuned, a line a seed."""
    head = (
        "| seed | AUC | p | loss | p | loss of desirable answers | ROUGE-L of written answers "
        "| p |\n"
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
        f"Time of a forward pass as a multiple of the base's, in turns, median of "
        f"{result['alternations']} (quartiles): merged {spread(merged)}; with the adapter attached "
        f"{spread(adapted)}; the base itself, measured again, {spread(null)}."
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
