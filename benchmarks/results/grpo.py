"""GRPO on pocket: one- and two-step arithmetic, worded as GSM8K, judged by the final number.

    python -m benchmarks.results.grpo [--seeds 3] [--steps 80] [--warm-steps 540] [--work FOLDER]

A short supervised run on worked answers first, merged into the base, since a model that is never
right has nothing to compare; then GRPO on other problems from that base, once a seed. The held-out
problems are in neither. Reward: 1 where an answer's last number is right, else 0. A run that lies
finished in the work folder is not trained again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from demo_data.arithmetic import generate_problems

from benchmarks.lib.machine import write
from benchmarks.results.pocket_runs import THREADS, metrics, run, warm_start
from inlay.data.read import read_rows

REWARDED, HELD_OUT = 2400, 500
"""The number of problems to train on with GRPO, and to measure on."""
ANSWER = 32
WARM: dict[str, Any] = {
    "model": "pocket", "data": "arithmetic", "split": [0.9, 0.05, 0.05], "epochs": 100,
    "rank": 32, "learning_rate": 4e-3, "warmup": 10, "batch_size": 8, "gradient_accumulation": 1,
    "generate_rows": 100, "generate_tokens": ANSWER, "log_every": 25,
}  # fmt: skip
REWARD: dict[str, Any] = {
    "task": "grpo", "rewards": ["final_number"], "rank": 16, "learning_rate": 2e-3,
    "batch_size": 64, "gradient_accumulation": 4, "num_generations": 8,
    "max_completion_tokens": ANSWER, "eval_rows": HELD_OUT, "log_every": 1,
}  # fmt: skip


def main() -> None:
    """Train; print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--warm-steps", type=int, default=540)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.work or Path(name)
        folder.mkdir(exist_ok=True)
        problems = write_problems(folder)
        warm = warmed(folder, given.warm_steps)
        print(warm, flush=True)
        runs = [rewarded(folder, seed, given.steps) for seed in range(given.seeds)]
    result = {
        "problems": problems,
        "warm_start": warm,
        "run": REWARD,
        "runs": runs,
        "steps": given.steps,
        "threads": THREADS,
    }
    print(write("grpo", result))


def write_problems(folder: Path) -> dict[str, int]:
    """Write new problems for training and held-out problems; return the counts."""
    known = {row.values["question"] for row in read_rows("arithmetic")}
    made = generate_problems(2 * (REWARDED + HELD_OUT), seed=1)
    fresh = [problem for problem in made if problem.question not in known]
    parts = {"held_out": fresh[:HELD_OUT], "rewarded": fresh[HELD_OUT : HELD_OUT + REWARDED]}
    for name, problems in parts.items():
        rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"warm": len(known), **{name: len(problems) for name, problems in parts.items()}}


def warmed(folder: Path, steps: int) -> dict[str, Any]:
    """Train on worked answers, merge the adapter, and return the share of right answers."""
    found = warm_start(folder, {**WARM, "max_steps": steps})
    return {
        "steps": found["steps"],
        "seconds": round(found["seconds"]),
        **metrics(found, ["number_match"]),
    }


def rewarded(folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """Train on rewards from the merged model; return the rewards of base and tuned."""
    files = {"data": "rewarded.jsonl", "eval_data": "held_out.jsonl", "model": "base"}
    placed = {key: str(folder / name) for key, name in files.items()}
    found = run(folder, f"rewarded-{seed}", {**REWARD, **placed, "max_steps": steps, "seed": seed})
    lines = (folder / f"rewarded-{seed}" / "metrics.jsonl").read_text().splitlines()
    curve = [line for line in map(json.loads, lines) if "loss" in line]
    result = {
        "seed": seed,
        "seconds": round(found["seconds"]),
        **metrics(found, ["reward", "sampled_reward", "kl", "answer_tokens"]),
        "reward_by_step": [round(line["reward"], 4) for line in curve],
        "kl_by_step": [round(line["kl"], 5) for line in curve],
        "equal_groups_by_step": [round(line["equal_groups"], 3) for line in curve],
    }
    print(result, flush=True)
    return result


if __name__ == "__main__":
    main()
