"""One run on 1, 2 and 4 processes of this CPU: memory of each, planned against measured, and speed.

    python -m benchmarks.memory.distributed [--processes 1 2 4] [--steps 3]

The same run file each time, on a random model of the 0.5B shape with three layers, dense and in
NF4: weights whole in one, two and four processes, and divided among two and four by FSDP2.
Measured are the bytes of frozen weights in each process between two passes, the most it held while
it trained (VmHWM, set back when training began: Python, the libraries and the weights included),
seconds a step without the first, and the largest difference of the losses from one process's. The
plan's parts are kept beside its total. More processes than cores share the cores: their seconds say
what dividing costs, not what it gains. docs/parallel.py draws the table of docs/guides/parallel.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import write

SHAPE = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "tie_word_embeddings": True,
}  # fmt: skip
RUN = {
    "data": "reports", "max_rows": 24, "split": [0.8, 0.1, 0.1], "dropout": 0.0, "rank": 8,
    "batch_size": 2, "gradient_accumulation": 4, "max_length": 256,
    "learning_rate": 1e-3, "scheduler": "constant",
    "warmup": 0.0, "evaluate": False, "eval_rows": 2, "log_every": 1, "save_every": 1000,
}  # fmt: skip
CASES = (("dense", "ddp"), ("dense", "fsdp"), ("nf4", "ddp"), ("nf4", "fsdp"))


def main() -> None:
    """Measure every case, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--output", default="distributed")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "RUN"))
    given = parser.parse_args()
    if given.worker:
        work(Path(given.worker[0]), json.loads(given.worker[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"), given.layers)
        cases = [
            measured(Path(folder), storage, parallel, size, given.steps)
            for storage, parallel in CASES
            for size in given.processes
            if parallel == "ddp" or size > 1
        ]
    for case in cases:
        one = next(c for c in cases if c["storage"] == case["storage"] and c["processes"] == 1)
        case["largest_loss_difference"] = difference(case, one)
        print(case)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    for case in cases:
        del case["losses"]
    result = {"shape": {**SHAPE, "num_hidden_layers": given.layers}, "run": RUN, "cases": cases}
    print(write(given.output, {**result, "steps": given.steps, "threads_each": threads}))


def save_model(folder: Path, layers: int) -> None:
    """Save the random model, with pocket's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from inlay.model.load.folder import EMBEDDED

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["pocket"])
    shape = {**SHAPE, "num_hidden_layers": layers}
    config = Qwen2Config(**shape, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measured(folder: Path, storage: str, parallel: str, size: int, steps: int) -> dict[str, Any]:
    """Train one case and return what its processes held and took."""
    name = f"{storage}-{parallel}-{size}"
    run = {**RUN, "model": str(folder / "model"), "output": str(folder / name), "max_steps": steps}
    run |= {"storage": storage, "parallel": parallel}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    module = ["-m", "benchmarks.memory.distributed", "--worker", str(folder)]
    words = [sys.executable, *(torchrun if size > 1 else []), *module]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([*words, json.dumps(run)], check=True, env=environment)
    processes = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(size)]
    record = json.loads((folder / name / "run.json").read_text())
    lines = [json.loads(x) for x in (folder / name / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    seconds = [b["seconds"] - a["seconds"] for a, b in pairwise(trained)]
    planned, peak = record["memory"]["planned_bytes"], max(p["peak"] for p in processes)
    return {
        "storage": storage,
        "parallel": parallel,
        "processes": size,
        "frozen_bytes": [p["frozen_bytes"] for p in processes],
        "peak_bytes": [p["peak"] for p in processes],
        "planned_bytes": planned,
        "planned_parts": record["memory"]["parts"],
        "planned_over_measured": round(planned / peak, 3),
        "activations": record["memory"]["activations"],
        "seconds_a_step": round(statistics.median(seconds), 4),
        "planned_seconds_a_step": round(planned_seconds(folder, run, size, environment), 4),
        "losses": [line["loss"] for line in trained],
    }


def planned_seconds(
    folder: Path, run: dict[str, Any], size: int, environment: dict[str, str]
) -> float:
    """Return what `inlay plan` says that a step takes on so many processes."""
    run_file = folder / "plan.yaml"
    run_file.write_text(json.dumps(run))
    words = ["-m", "inlay", "plan", str(run_file), "--processes", str(size), "--json"]
    done = subprocess.run(
        [sys.executable, *words], check=True, env=environment, capture_output=True, text=True
    )
    return json.loads(done.stdout)["step"]["seconds"]


def difference(case: dict[str, Any], one: dict[str, Any]) -> float:
    """Return the largest difference between a case's losses and those of one process."""
    return max(abs(a - b) for a, b in zip(case["losses"], one["losses"], strict=True))


def work(folder: Path, run: dict[str, Any]) -> None:
    """Take part in one run; write what this process held."""
    import torch

    from inlay.memory.probe import measuring
    from inlay.model.stream.shard import resident_bytes
    from inlay.tasks.config import load_config
    from inlay.train.run import train
    from inlay.train.trainer import AdapterLoop

    trained, found = AdapterLoop.train, {}

    def watched(self: AdapterLoop, *args: Any, **kwargs: Any) -> Any:
        found["frozen_bytes"] = resident_bytes(self.adapted)
        with measuring(torch.device("cpu")) as held:
            result = trained(self, *args, **kwargs)
        found["peak"] = held.peak
        return result

    AdapterLoop.train = watched
    train(load_config(None, run))
    rank = os.environ.get("RANK", "0")
    (folder / f"{Path(run['output']).name}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
