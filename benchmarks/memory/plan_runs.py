"""Planned against measured memory of whole runs: `inlay train` itself, on real rows, on this CPU.

    python -m benchmarks.memory.plan_runs [--only TEXT] [--processes 1]

A case is a model's shape, a method, a storage, a dtype, rows, a length and a batch size. Each run
is a process of its own, with the comparison at its end; its run.json says what was planned and the
most that the process held. The models have random weights of a few layers, but pocket is trained.
Cases that are not run now keep the rows of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import FIGURES, PROBLEMS, REPORTS, class_of_cpu, write

STEPS = 12
SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "heads": 14, "kv": 2, "layers": 2},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "heads": 9, "kv": 3, "layers": 8},
}
"""Shapes of Qwen2.5-0.5B and SmolLM2-135M, with fewer layers and pocket's vocabulary."""
KEYS = ("model", "method", "storage", "dtype", "rows", "length", "batch")
"""The fields of a case."""
ROWS = {
    "reports": {"data": str(REPORTS), "prompt": "findings", "completion": "impression"},
    "problems": {"data": str(PROBLEMS), "prompt": "question", "completion": "answer"},
}


def cases() -> list[dict[str, Any]]:
    """Return every case."""
    base = {"storage": "dense", "dtype": "bfloat16", "rows": "reports", "length": 512, "batch": 4}
    found = [
        {"model": m, "method": method, **base, **more}
        for m, method, more in (
            *(("pocket", n, {}) for n in ("lora", "dora", "ia3", "bottleneck", "prefix")),
            ("pocket", "lora", {"dtype": "float32"}),
            ("pocket", "lora", {"storage": "nf4"}),
            ("pocket", "lora", {"storage": "int8"}),
            ("pocket", "lora", {"rows": "problems"}),
            ("pocket", "lora", {"batch": 16}),
            ("pocket", "full", {"dtype": "float32"}),
            *(("135M", "lora", {"storage": s}) for s in ("dense", "nf4", "int8")),
            *(("135M", "lora", {"dtype": "float32", "storage": s}) for s in ("dense", "nf4")),
            ("135M", "dora", {}),
            ("135M", "bottleneck", {"rows": "problems"}),
            ("135M", "lora", {"rows": "problems", "batch": 8}),
            *(("0.5B", "lora", {"storage": s}) for s in ("dense", "nf4", "int8")),
            ("0.5B", "lora", {"dtype": "float32", "batch": 2}),
            ("0.5B", "lora", {"storage": "nf4", "rows": "problems", "batch": 8}),
            ("0.5B", "ia3", {}),
            ("0.5B", "lora", {"length": 1024, "batch": 8}),
        )
    ]
    return found


def made(name: str, folder: Path, dtype: str) -> str:
    """Save random weights of a shape with pocket's tokenizer; return the folder, or `pocket`."""
    if name == "pocket":
        return name
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from inlay.model.load.folder import EMBEDDED

    path, shape = folder / f"{name}-{dtype}", SHAPES[name]
    if path.exists():
        return str(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        dtype=dtype,
    )
    Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(EMBEDDED["pocket"]) / file, path)
    return str(path)


def measured(case: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """Run `inlay train` on a case; return what was planned, what was held, and the difference."""
    rows = ROWS[case["rows"]]
    words = ["train", "--model", model, "--output", str(folder), "--method", case["method"]]
    words += ["--storage", case["storage"], "--dtype", case["dtype"], "--threads", "1"]
    words += ["--max-length", str(case["length"]), "--batch-size", str(case["batch"])]
    words += ["--max-steps", str(STEPS), "--eval-rows", "8", "--generate-rows", "4"]
    words += ["--generate-tokens", "16", "--max-rows", "400", "--skip-empty"]
    words += [word for key, value in rows.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "inlay", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name_of(case)}: {done.stderr[-800:]}")
    run = json.loads((folder / "run.json").read_text())
    planned, held = run["memory"]["planned_bytes"], run["peak_memory_bytes"]
    error = planned / held - 1
    print(f"{name_of(case):<60}{planned / 1e6:8.0f}{held / 1e6:8.0f}{error:+8.1%}", flush=True)
    return {**case, "planned": planned, "measured": held, "error": error}


def name_of(case: dict[str, Any]) -> str:
    """Return a case's name."""
    return "-".join(str(value) for value in case.values())


def main() -> None:
    """Measure the cases and write plan_runs.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    chosen = [case for case in cases() if arguments.only in name_of(case)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.processes) as pool:
        folder = Path(name)
        models = [made(case["model"], folder, case["dtype"]) for case in chosen]
        folders = [folder / f"run{i}" for i in range(len(chosen))]
        rows = list(pool.map(measured, chosen, models, folders))
    within = sum(0 <= row["error"] <= 0.05 for row in rows)
    print(f"{within} of {len(rows)} planned within 5% over, none under")
    output = f"plan_runs{class_of_cpu()}"
    write(output, {"steps": STEPS, "rows": in_order([*before(output), *rows])})


def before(output: str) -> list[dict[str, Any]]:
    """Return the rows that an earlier run wrote."""
    path = FIGURES / f"{output}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last row of each case, in the cases' order."""
    last = {name_of({key: row[key] for key in KEYS}): row for row in rows}
    return [last[name] for name in map(name_of, cases()) if name in last]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
